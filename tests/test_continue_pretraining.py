"""Continued pre-training on translation and on denoising, and the spectrum put back, as users run them."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import neuron_specialization as ns
from neuron_specialization.analysis.spectrum import singular_values
from neuron_specialization.translation.alignment import alignment_loss
from neuron_specialization.translation.checkpoints import load_checkpoint, new_model
from neuron_specialization.translation.denoising import MASK_TOKEN
from neuron_specialization.translation.tokenization import train_tokenizer
from neuron_specialization.translation.training import fit

from .conftest import make_masks
from .test_training import arguments

PAIRS = ["Pv-Aa", "Aa-Pv"]


@pytest.fixture(scope="module")
def start(toy, toy_data, tmp_path_factory):
    """A checkpoint whose tokenizer has a mask token."""
    text = (s for rows in toy_data["train"].values() for side in rows.column_names for s in rows[side])
    tokenizer = train_tokenizer(text, toy.languages, 300, 64, MASK_TOKEN)
    torch.manual_seed(0)
    model = new_model(tokenizer, layers=1, d_model=16, d_ff=20, heads=2, dropout=0.1, max_length=64)
    model.generation_config.max_length = 8
    directory = tmp_path_factory.mktemp("start")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def options(toy, toy_files, start):
    splits = ("train", "validation", "test")
    files = [word for split in splits for word in (f"--{split}_file", f"{toy_files}/{split}.jsonl")]
    return [
        *("--model_name_or_path", str(start), "--language_pairs", *PAIRS, *files, "--max_sentences", "30"),
        *("--max_steps", "2", "--eval_steps", "2", "--per_device_train_batch_size", "8", "--max_length", "64"),
        *("--num_beams", "1", "--disable_tqdm", "true", "--learning_rate", "0.01"),
    ]


def test_translation_its_control_and_masks_see_the_same_target_tokens(run_here, options, start, tmp_path):
    make_masks(load_checkpoint(str(start))[0], PAIRS).save_pretrained(tmp_path / "masks")
    runs = {"mt": [], "denoise": ["--objective", "denoising"], "sparse": ["--masks", str(tmp_path / "masks")]}
    found = {}
    for name, more in runs.items():
        printed = run_here("continue_pretraining.py", *options, "--output_dir", str(tmp_path / name), *more)
        found[name] = json.loads((tmp_path / name / "results.json").read_text())
        assert "target_tokens" in printed and set(found[name]["scores"]["directions"]) == set(PAIRS)
        assert found[name]["updates"] == 2 and "bleu" in found[name]["scores"]["averages"]["all"]
    assert len({results["target_tokens"] for results in found.values()}) == 1
    assert found["mt"]["log"] != found["denoise"]["log"]
    adapter = ns.NeuronMasks.from_pretrained(tmp_path / "sparse" / "adapter")
    assert adapter.language_pairs == PAIRS

    again = ["--output_dir", str(tmp_path / "mt"), "--num_beams"]
    written = (tmp_path / "mt" / "results.json").stat().st_mtime_ns
    run_here("continue_pretraining.py", *options, *again, "1")
    assert (tmp_path / "mt" / "results.json").stat().st_mtime_ns == written
    run_here("continue_pretraining.py", *options, *again, "2")
    rescored = json.loads((tmp_path / "mt" / "results.json").read_text())
    assert rescored["scores"]["of"]["num_beams"] == 2 and rescored["log"] == found["mt"]["log"]

    scored = ["--language_pairs", "Pv-Aa", "--test_file", options[options.index("--test_file") + 1]]
    where = ["--model_name_or_path", str(tmp_path / "mt" / "model"), "--spectrum_of", str(start)]
    run_here("score.py", *where, *scored, "--num_beams", "1", "--output_dir", str(tmp_path / "restored"))
    restored, tokenizer = load_checkpoint(str(tmp_path / "restored" / "model"))
    source, trained = (load_checkpoint(str(path))[0] for path in (start, tmp_path / "mt" / "model"))
    spectra = singular_values(source), singular_values(restored)
    for name in spectra[0].keys() & dict(source.named_parameters()):  # the tied output keeps the gain of its norm
        torch.testing.assert_close(spectra[1][name], spectra[0][name], rtol=1e-3, atol=1e-4)
    assert tokenizer.mask_token == MASK_TOKEN and not restored.get_input_embeddings().weight.equal(
        trained.get_input_embeddings().weight
    )


def test_the_alignment_loss_knows_translations_whatever_their_padding():
    torch.manual_seed(0)
    source, mask = torch.randn(4, 6, 8), torch.ones(4, 6)
    order = torch.randperm(6)
    found = alignment_loss(source, mask, source[:, order] * 3, mask)
    assert found < 0.01, "the same tokens, in another order"
    assert alignment_loss(source, mask, source.flip(0), mask) > 5, "translations of other sentences"
    padded = torch.cat([source[:, order], torch.randn(4, 2, 8)], 1)
    longer = torch.cat([mask, torch.zeros(4, 2)], 1)
    torch.testing.assert_close(alignment_loss(source, mask, padded, longer), found)
    torch.testing.assert_close(alignment_loss(padded, longer, source, mask), found)


def test_aligning_brings_the_states_of_translations_together(toy_data, start, tmp_path):
    losses = {}
    for weight in (0.0, 5.0):
        model, tokenizer = load_checkpoint(str(start))
        rows = {"Pv-Aa": toy_data["train"]["Pv-Aa"].select(range(16))}
        args = arguments(tmp_path / str(weight), max_steps=8, per_device_train_batch_size=16)
        logged = fit(model, tokenizer, rows, None, args, alignment=weight)["log"]
        sides = [
            tokenizer(list(rows["Pv-Aa"][side]), padding=True, return_tensors="pt") for side in ("source", "target")
        ]
        with torch.no_grad():
            states = [model.eval().get_encoder()(**side)[0] for side in sides]
        losses[weight] = alignment_loss(states[0], sides[0].attention_mask, states[1], sides[1].attention_mask)
        assert len(logged) >= 8
    assert losses[5.0] < losses[0.0]
    with pytest.raises(ValueError, match="alignment was 5.0, now null"):
        fit(load_checkpoint(str(start))[0], tokenizer, rows, None, args)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--objective", "denoising", "--alignment", "1"], "needs --objective translation"),
        (["--language_pairs", "Pv-Pv"], "source and target are the same sentence"),
        (["--objective", "denoising", "--language_pairs", "Pv-Pv"], "pretrain.py takes monolingual text"),
        (["--objective", "denoising", "--mask_share", "2"], "Expected a mask_share between 0 and 1"),
        (["--masks", "nowhere"], "nowhere"),
        (["--max_steps", "-1"], "Set max_steps"),
    ],
)
def test_bad_input_is_one_sentence(run_here, options, tmp_path, wrong, message):
    error = run_here("continue_pretraining.py", *options, "--output_dir", str(tmp_path / "out"), *wrong, fails=True)
    assert error.splitlines()[-1].startswith("Error: ") and message in error.splitlines()[-1]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_checkpoint_without_a_mask_token_is_refused(run_here, options, toy_checkpoint, tmp_path):
    options[1] = str(toy_checkpoint)
    more = ["--objective", "denoising", "--output_dir", str(tmp_path / "out")]
    assert "Denoising needs a mask token" in run_here("continue_pretraining.py", *options, *more, fails=True)


def test_a_checkpoint_without_encoder_is_refused(run_here, options, start, tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)).save_pretrained(tmp_path / "decoder")
    options[1] = str(tmp_path / "decoder")
    error = run_here("continue_pretraining.py", *options, "--output_dir", str(tmp_path / "out"), fails=True)
    assert error.splitlines()[-1].startswith("Error: Cannot load")
    assert "expected a directory or Hub id of an encoder-decoder model" in error.splitlines()[-1]
