"""Adding pairs without forgetting: `protected_pairs` freezes the rows of ΔW1 that some pairs use."""

import copy
import json
import pickle
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import neuron_specialization as ns
from neuron_specialization.adapter.adding_pairs import trainable_shares
from neuron_specialization.translation.token_loss import token_losses
from neuron_specialization.translation.training import fit

from .conftest import PAIRS, make_batch, make_m2m100, make_masks
from .test_adapter import adapt
from .test_merging import MasterWeights
from .test_training import arguments

ROOT = Path(__file__).parent.parent


def protecting(model, masks, **config):
    return adapt(model, masks, protected_pairs=["en-de"], init_weights=False, **config)


def delta_of(adapted, name) -> torch.Tensor:
    return adapted.base_model.model.get_submodule(name).neuron_specialization_delta["default"]


def check_protected(adapted, masks, before):
    """Rows that en-de keeps stand, the others that some pair keeps moved."""
    for name, delta in before.items():
        used, rows = masks.row("en-de", name), masks.rows[name].any(0)
        now = delta_of(adapted, name)
        assert now[used].equal(delta[used]), name
        assert (rows & ~used).any() and (now[rows & ~used] != delta[rows & ~used]).any(1).all(), name


@pytest.mark.usefixtures("each_batch_size")
@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "master weights"])
def test_no_optimizer_moves_the_rows_of_protected_pairs(optimizer, copied):
    """In spite of weight decay and of momentum from before; and they take no part in the norm of the gradients."""
    model = make_m2m100()
    masks = make_masks(model, k=0.4)
    adapted = protecting(model, masks).train()
    adapted = copied(adapted) if copied else adapted
    trained = [p for p in adapted.parameters() if p.requires_grad]
    kinds = {"adamw": torch.optim.AdamW, "sgd": lambda p, **k: torch.optim.SGD(p, momentum=0.9, **k)}
    steps = MasterWeights(trained) if optimizer == "master weights" else None
    steps = steps or kinds[optimizer](trained, lr=0.05, weight_decay=0.1)
    if optimizer != "master weights":
        for parameter in trained:
            parameter.grad = torch.randn_like(parameter)
        steps.step()  # momentum in every row
    before = {name: delta_of(adapted, name).detach().clone() for name in masks.rows}
    for pairs in (PAIRS, "en-fr"):
        adapted.zero_grad()
        adapted(**make_batch(), language_pairs=pairs).loss.backward()
        for name in masks.rows:
            gradient = delta_of(adapted, name).grad
            assert not gradient[masks.row("en-de", name)].any() and gradient.any()
        steps.step()
    adapted(**make_batch(), language_pairs="en-fr")  # what was written from master weights is put back
    check_protected(adapted, masks, before)


def test_an_adapter_that_is_loaded_again_protects_the_same_rows(tmp_path):
    model, batch = make_m2m100(), make_batch()
    masks = make_masks(model, k=0.4)
    protecting(copy.deepcopy(model), masks).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].protected_pairs == ["en-de"]
    before = {name: delta_of(loaded, name).detach().clone() for name in masks.rows}
    expected = loaded(**batch, language_pairs="en-de").logits
    optimizer = torch.optim.AdamW(loaded.parameters(), lr=0.05, weight_decay=0.1)
    loaded(**batch, language_pairs=PAIRS).loss.backward()
    optimizer.step()
    check_protected(loaded, masks, before)
    assert loaded(**batch, language_pairs="en-de").logits.equal(expected)
    loaded.delete_adapter("default")


@pytest.fixture
def selected(toy_model, toy_tokenizer, toy_data):
    """The masks of an old pair and of one to add."""
    counts = ns.record_corpus(toy_model, toy_tokenizer, toy_data["validation"])
    masks = ns.CumulativeThreshold(0.3).select(counts)
    return {pair: only_pair(masks, pair) for pair in ("Pv-Aa", "Pv-Ba")}


def only_pair(masks, pair):
    rows = {name: masks.row(pair, name)[None] for name in masks.rows}
    routes = ns.neurons.language_pairs.Routes.per_pair([pair])
    return ns.NeuronMasks(rows, masks.stacks, routes, masks.selector, masks.fingerprint, masks.language_token_ids)


@pytest.mark.parametrize("update_only", [False, True])
def test_a_pair_is_added_and_the_old_one_translates_as_before(
    update_only, selected, toy_model, toy_tokenizer, toy_data, tmp_path
):
    old, new = "Pv-Aa", "Pv-Ba"
    text = {pair: toy_data["validation"][pair].select(range(16)) for pair in (old, new)}
    config = ns.NeuronSpecializationConfig(masks=selected[old], update_only=update_only, task_type="SEQ_2_SEQ_LM")
    first = get_peft_model(copy.deepcopy(toy_model), config)
    fit(first, toy_tokenizer, {old: toy_data["train"][old]}, None, arguments(tmp_path / "first", max_steps=4))
    tokenized = toy_tokenizer(
        text[old]["source"][:], text_target=text[old]["target"][:], return_tensors="pt", padding=True
    )
    expected = {n: first.eval()(**tokenized, language_pairs=[old] * n).logits for n in (1, 16)}

    adapted = ns.add_pairs(copy.deepcopy(toy_model), tmp_path / "first" / "adapter", selected[new], [old])
    assert adapted.peft_config["default"].language_pairs == [old, new]
    assert adapted.peft_config["default"].update_only == update_only
    shares = trainable_shares(adapted.peft_config["default"].masks, [old], [new])
    kept = {name: (selected[old].rows[name][0], selected[new].rows[name][0]) for name in selected[new].rows}
    own = sum(int((b & ~a).sum()) for a, b in kept.values())
    assert shares == {new: own / sum(int(b.sum()) for _, b in kept.values())} and 0 < shares[new] < 1
    before = token_losses(adapted, toy_tokenizer, {new: text[new]})[new]
    args = arguments(tmp_path / "second", max_steps=12, weight_decay=0.1)
    fit(adapted, toy_tokenizer, {new: toy_data["train"][new]}, None, args)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(toy_model), tmp_path / "second" / "adapter")
    for model in (adapted.eval(), reloaded):
        for n, logits in expected.items():
            assert model(**tokenized, language_pairs=[old] * n).logits.equal(logits)
        assert token_losses(model, toy_tokenizer, {new: text[new]})[new] < before - 0.02


def test_the_recipe_protects_reports_and_refuses(
    selected, toy_model, toy_tokenizer, toy_data, toy_files, toy_checkpoint, tmp_path, monkeypatch, capsys
):
    config = ns.NeuronSpecializationConfig(masks=selected["Pv-Aa"], task_type="SEQ_2_SEQ_LM")
    ns.save_adapter(get_peft_model(toy_model, config), tmp_path / "old")
    selected["Pv-Ba"].save_pretrained(tmp_path / "new")
    output = tmp_path / "run"

    def specialize(*options):
        words = [
            ROOT / "recipes" / "specialize.py",
            "--model_name_or_path",
            toy_checkpoint,
            "--adapter",
            tmp_path / "old",
        ]
        words += ["--masks", tmp_path / "new", "--language_pairs", "Pv-Ba", "--output_dir", output, *options]
        words += [w for split in ("train", "validation") for w in (f"--{split}_file", toy_files / f"{split}.jsonl")]
        words += ["--max_steps", 2, "--eval_steps", 2, "--use_cpu", "true", "--per_device_train_batch_size", 8]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        runpy.run_path(sys.argv[0], run_name="__main__")

    for options, message in (
        (["--protect", "Pv-Aa"], "need --masks and --trainable delta"),
        (["--protect", "Pv-Xx", "--trainable", "delta"], "no language pair 'Pv-Xx'"),
        (["--protect", "Pv-Ba", "--trainable", "delta"], "use every row of ΔW1 that Pv-Ba would train"),
    ):
        with pytest.raises(SystemExit):
            specialize(*options)
        assert message in capsys.readouterr().err and not output.exists()
    specialize("--protect", "Pv-Aa", "--trainable", "delta")
    share = json.loads((output / "results.json").read_text())["share_of_rows_trained"]["Pv-Ba"]
    assert 0 < share < 1 and f"{share:.2f}" in capsys.readouterr().out
    assert json.loads((output / "adapter" / "adapter_config.json").read_text())["protected_pairs"] == ["Pv-Aa"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"trainable": "full"}, "needs trainable='delta'.*got 'full'"),
        ({"trainable": "low_rank"}, "needs trainable='delta'.*got 'low_rank'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save and trainable_token_indices train what all pairs share"),
        ({"protected_pairs": ["en-it"]}, "no language pair 'en-it'"),
    ],
)
def test_what_cannot_be_protected_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ns.NeuronSpecializationConfig(**{"language_pairs": PAIRS, "protected_pairs": ["en-de"], **config})


def test_pairs_are_added_to_delta_adapters_only(tmp_path):
    model = make_m2m100()
    masks = make_masks(model)
    adapt(copy.deepcopy(model), masks, trainable="low_rank").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has trainable='low_rank'"):
        ns.add_pairs(model, tmp_path, masks)


def test_pairs_are_added_to_an_adapter_with_a_resized_vocabulary_or_the_model_stays_as_it_was(tmp_path):
    model = make_m2m100()
    model.resize_token_embeddings(72)
    masks, plain = make_masks(model), copy.deepcopy(model)
    adapt(copy.deepcopy(model), masks, init_weights=False).save_pretrained(tmp_path)
    new = make_masks(model, ["en-cs"])
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    tensors = load_file(path)
    save_file({key: tensor for key, tensor in tensors.items() if "layers.0.fc1" not in key}, path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "weights_digest": None}))
    with pytest.raises(ValueError):
        ns.add_pairs(model, tmp_path, new)
    assert not hasattr(model, "peft_config") and model(**make_batch()).logits.equal(plain(**make_batch()).logits)
    path.write_bytes(whole)
    adapted = ns.add_pairs(model, tmp_path, new)
    assert adapted.peft_config["default"].language_pairs == [*PAIRS, "en-cs"]
    assert adapted(**make_batch(), language_pairs="en-cs").logits.shape[-1] == 72
