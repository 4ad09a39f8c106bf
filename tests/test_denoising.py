"""Denoising: what the noise does to a sentence, when it is drawn, and that runs resume with the same noise."""

import copy
import json
from collections import Counter

import numpy as np
import pytest
import torch

from neuron_specialization.translation.arrow import list_lengths
from neuron_specialization.translation.checkpoints import new_model
from neuron_specialization.translation.data import load_parallel
from neuron_specialization.translation.denoising import MASK_TOKEN, Noise, NoisyExamples, ObjectiveArguments
from neuron_specialization.translation.encoding import encode_parallel
from neuron_specialization.translation.tokenization import train_tokenizer
from neuron_specialization.translation.trainer import SpecializationTrainer
from neuron_specialization.translation.training import fit

from .test_training import StopAfter, arguments, weights

TEXT = ["a b c. d e f! g h i? j k l.", "a。b c。", "a b c d e f g h i j k l m n o p q r s t"]


@pytest.fixture(scope="module")
def tokenizer(toy, toy_data):
    text = [*TEXT * 3, *(s for rows in toy_data["train"].values() for side in rows.column_names for s in rows[side])]
    return train_tokenizer(text, toy.languages, 500, 64, MASK_TOKEN)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return new_model(tokenizer, layers=1, d_model=16, d_ff=16, heads=2, dropout=0.1, max_length=64)


def draw(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("share", "mean"), [(0.35, 3.5), (0.1, 1), (0.8, 2)])
def test_masks_cover_the_share_and_leave_tags_alone(tokenizer, share, mean):
    noise = Noise(tokenizer, share, mean, permute_sentences=False)
    sentence = [tokenizer.convert_tokens_to_ids("Aa"), *range(10, 60), tokenizer.eos_token_id]
    lengths = []
    for seed in range(200):
        noised = noise(sentence, draw(seed))
        kept = [token for token in noised if token != noise.mask]
        assert noised[0] == sentence[0] and noised[-1] == sentence[-1] and len(noised) <= len(sentence)
        assert len(kept) == len(sentence) - round(share * 50)
        assert kept[1:-1] == sorted(kept[1:-1]), "the rest keeps its order"
        lengths.append(round(share * 50) / len([token for token in noised if token == noise.mask]))
    if mean == 3.5:
        assert np.mean(lengths) == pytest.approx(3.5, abs=0.6)
    assert noise(sentence, draw(1)) == noise(sentence, draw(1)) != noise(sentence, draw(2))
    assert noise([sentence[0], sentence[-1]], draw(0)) == [sentence[0], sentence[-1]]


def test_whole_sentences_change_places(tokenizer):
    noise = Noise(tokenizer, 1e-9)
    orders = set()
    for seed in range(40):
        noised = noise(tokenizer(TEXT[0])["input_ids"], draw(seed))
        orders.add(text := tokenizer.decode(noised, skip_special_tokens=True))
        assert all(sentence in text for sentence in ("a b c.", "d e f!", "g h i?", "j k l."))
    assert len(orders) > 10
    assert noise(tokenizer(TEXT[2])["input_ids"], draw(0)) == tokenizer(TEXT[2])["input_ids"]


@pytest.fixture
def monolingual(toy_files):
    return {
        split: load_parallel(str(toy_files / f"{split}.jsonl"), ["Aa-Aa", "Pv-Pv"])
        for split in ("train", "validation")
    }


def test_targets_stay_clean_and_noise_is_fresh_in_training_only(toy, tokenizer, model, monolingual, tmp_path):
    assert monolingual["train"]["Aa-Aa"]["source"][:] == monolingual["train"]["Aa-Aa"]["target"][:]
    rows = {pair: data.select(range(8)) for pair, data in monolingual["train"].items()}
    tokens = {code: code for code in toy.languages}
    encoded = encode_parallel(rows, tokenizer, tokens)
    clean = {tuple(labels) for labels in encoded["labels"]}
    args = arguments(tmp_path, max_steps=6)
    trainer = SpecializationTrainer(model, args, tokenizer, encoded, encoded, list(rows), Noise(tokenizer))
    inputs = Counter()
    count = 0
    for batch in trainer.get_train_dataloader():
        for noised, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            assert tuple(label for label in labels if label != -100) in clean
            assert tokenizer.mask_token_id in noised and noised[0] == labels[0], "the tag stays"
            inputs[tuple(noised)] += 1
            count += sum(label != -100 for label in labels)
    assert len(inputs) > 30, "8 sentences, 3 times each: another noise every time"
    assert trainer.target_tokens(6) == count and list_lengths(encoded, "labels").sum() == sum(map(len, clean))
    first, second = ([batch["input_ids"].tolist() for batch in trainer.get_eval_dataloader()] for _ in range(2))
    assert first == second and str(tokenizer.mask_token_id) in json.dumps(first)
    other = NoisyExamples(encoded, Noise(tokenizer), seed=1)
    assert [other[i]["input_ids"] for i in range(8)] != [trainer.eval_dataset[i]["input_ids"] for i in range(8)]


def test_a_resumed_run_ends_like_an_uninterrupted_one(tokenizer, model, monolingual, tmp_path, monkeypatch):
    ends = []
    for interrupted in (False, True):
        options = {"max_steps": 4, "save_steps": 2, "seed": 5}
        if interrupted:
            with monkeypatch.context() as patch:
                original = SpecializationTrainer.__init__

                def stopping(self, *a, original=original, **k):
                    original(self, *a, **k)
                    self.add_callback(StopAfter(3))

                patch.setattr(SpecializationTrainer, "__init__", stopping)
                args = arguments(tmp_path / "1", **options)
                with pytest.raises(KeyboardInterrupt):
                    fit(copy.deepcopy(model), tokenizer, monolingual["train"], None, args, noise=Noise(tokenizer))
        trained = copy.deepcopy(model)
        args = arguments(tmp_path / str(int(interrupted)), **options)
        fit(trained, tokenizer, monolingual["train"], None, args, noise=Noise(tokenizer))
        ends.append(weights(trained))
    assert all(ends[1][name].equal(weight) for name, weight in ends[0].items())
    with pytest.raises(ValueError, match="noise was .*0.35.*, now .*0.2"):
        fit(model, tokenizer, monolingual["train"], None, args, noise=Noise(tokenizer, 0.2))


def test_what_cannot_be_denoised_is_refused(toy_tokenizer, tokenizer):
    with pytest.raises(ValueError, match="Denoising needs a mask token"):
        Noise(toy_tokenizer)
    with pytest.raises(ValueError, match="mask_share between 0 and 1.*got 1.5"):
        Noise(tokenizer, 1.5)
    with pytest.raises(ValueError, match="de-de: source and target are the same sentence"):
        ObjectiveArguments().check(["en-de", "de-de"], "source")
    with pytest.raises(ValueError, match="source_tag must be 'source'"):
        ObjectiveArguments("denoising").check(["de-de"], "target")
    with pytest.raises(ValueError, match="The token '<mask>' occurs in the text"):
        train_tokenizer(["a <mask> b"], ["en"], 50, mask_token=MASK_TOKEN)


def test_the_recipe_pretrains_on_monolingual_text(run_here, toy_files, tmp_path):
    for split in ("train", "validation"):
        rows = load_parallel(str(toy_files / f"{split}.jsonl"), ["Aa-Pv"])["Aa-Pv"]
        for code, side in (("Aa", "source"), ("Pv", "target")):
            (tmp_path / f"{split}.{code}").write_text("\n".join(rows[side][:]) + "\n")
    printed = run_here(
        "pretrain.py",
        *("--objective", "denoising", "--language_pairs", "Aa-Aa", "Pv-Pv", "--vocab_size", "300"),
        *("--train_file", str(tmp_path / "train.{lang}"), "--validation_file", str(tmp_path / "validation.{lang}")),
        *("--layers", "1", "--d_model", "16", "--d_ff", "16", "--heads", "2", "--max_length", "64"),
        *("--max_steps", "2", "--eval_steps", "2", "--output_dir", str(tmp_path / "run"), "--disable_tqdm", "true"),
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["target_tokens"] > 0 and "target_tokens" in printed
    assert any("mask_share" in each for each in results["arguments"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["depends_on"]["noise"]["mean_span"] == 3.5
