"""`update_only`: the base stays dense, and each pair adds the rows of ΔW1 that its masks keep."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

import neuron_specialization as ns

from .conftest import PAIRS, make_batch, make_m2m100, make_masks, make_t5
from .test_adapter import adapt, gradients

MAKERS = pytest.mark.parametrize("make", [make_m2m100, make_t5], ids=["plain", "gated"])
TRAINED = pytest.mark.parametrize("trainable", ["delta", "low_rank"])


def updated(model, masks, **config):
    return adapt(model, masks, **{"update_only": True, "init_weights": False, **config})


def deltas(adapted, adapter="default") -> dict[str, torch.Tensor]:
    modules = {name: adapted.base_model.model.get_submodule(name) for name in adapted.peft_config[adapter].d_ff}
    return {name: layer.delta(adapter).detach() for name, layer in modules.items()}


def with_updates(model, masks, pair, found):
    """The formula: a plain copy of `model` with m ⊙ ΔW1 added to W1."""
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for name, delta in found.items():
            reference.get_submodule(name).weight += masks.row(pair, name)[:, None] * delta
    return reference


@pytest.mark.usefixtures("each_batch_size")
@TRAINED
@MAKERS
def test_outputs_and_gradients_are_those_of_the_formula(make, trainable):
    model = make().double()
    batch, masks = make_batch(pad=model.config.pad_token_id), make_masks(model)
    adapted = updated(copy.deepcopy(model), masks, trainable=trainable).double()
    reference = with_updates(model, masks, "en-de", deltas(adapted))
    expected, found = reference(**batch), adapted(**batch, language_pairs="en-de")
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-10, atol=1e-10)
    expected.loss.backward()
    found.loss.backward()
    theirs, mine = gradients(reference), gradients(adapted)
    assert mine and all("neuron_specialization_delta" in name for name in mine), "the base stays frozen"
    for name in masks.rows:
        of_delta = theirs[f"{name}.weight"] * masks.row("en-de", name)[:, None]
        layer = adapted.base_model.model.get_submodule(name)
        if trainable == "delta":
            torch.testing.assert_close(
                layer.neuron_specialization_delta["default"].grad, of_delta, rtol=1e-9, atol=1e-10
            )
        else:
            b, a = layer.neuron_specialization_delta_b["default"], layer.neuron_specialization_delta_a["default"]
            torch.testing.assert_close(b.grad, of_delta @ a.T, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(a.grad, b.T @ of_delta, rtol=1e-9, atol=1e-10)


@TRAINED
def test_before_training_every_pair_is_the_base_exactly(trainable):
    model, batch = make_m2m100(), make_batch()
    expected = model(**batch).logits
    adapted = updated(model, make_masks(model), trainable=trainable, init_weights=True).eval()
    for pairs in ("en-de", PAIRS):
        assert adapted(**batch, language_pairs=pairs).logits.equal(expected)


@pytest.mark.usefixtures("each_batch_size")
@TRAINED
@MAKERS
def test_a_mixed_batch_with_samples_of_the_base_equals_runs_of_one_pair(make, trainable):
    model = make().double()
    batch, pairs = make_batch(pad=model.config.pad_token_id), ["en-de", "en-it", "fr-en", "de-en"]
    masks = make_masks(model, ["en-de", "de-en", "fr-en"])
    with torch.no_grad():  # attention takes other kernels where its bias trains
        base = model(**batch).logits
    adapted = updated(model, masks, trainable=trainable, default_pair="base").double().eval()
    mixed = adapted(**batch, language_pairs=pairs)
    for i, pair in enumerate(pairs):
        with torch.no_grad():
            alone = adapted(**batch, language_pairs=pair).logits
        torch.testing.assert_close(mixed.logits[i], alone[i], rtol=1e-10, atol=1e-10)
        assert alone.equal(base) == (pair == "en-it")
    mixed.loss.backward()
    for name in masks.rows:
        layer = adapted.base_model.model.get_submodule(name)
        moved = next(p for n, p in layer.named_parameters() if n.endswith(("delta.default", "delta_b.default"))).grad
        kept = torch.stack([masks.row(pair, name) for pair in masks.language_pairs]).any(0)
        assert not kept.all() and not moved[~kept].any() and moved[kept].any()


def test_merging_one_pair_is_exact_and_so_is_unmerging():
    model, batch = make_m2m100(), make_batch()
    masks = make_masks(model)
    adapted = updated(copy.deepcopy(model), masks).eval()
    expected = adapted(**batch, language_pairs="en-fr").logits
    adapted.set_language_pair("en-fr")
    adapted.merge_adapter()
    assert adapted(**batch).logits.equal(expected)
    adapted.unmerge_adapter()
    assert adapted(**batch, language_pairs="en-fr").logits.equal(expected)
    with adapted.disable_adapter():
        assert adapted(**batch).logits.equal(model(**batch).logits)
    merged = adapted.merge_and_unload()
    assert merged(**batch).logits.equal(expected)
    for name, delta in deltas(updated(make_m2m100(), masks)).items():
        now, before = merged.get_submodule(name).weight, model.get_submodule(name).weight
        off = ~masks.row("en-fr", name)
        assert now[off].equal(before[off]) and delta.shape == now.shape


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("pairs", ["en-de", PAIRS], ids=["one pair", "mixed"])
def test_beside_an_adapter_that_masks_it_masks_nothing(pairs):
    """W1 + ΔW_a + m_b ⊙ ΔW_b, and a's masks over that."""
    model, batch = make_m2m100().double(), make_batch()
    masks = {name: make_masks(model, seed=seed) for name, seed in (("a", 0), ("b", 5))}
    plain = copy.deepcopy(model)
    for name, of in masks.items():
        model.add_adapter(ns.NeuronSpecializationConfig(masks=of, init_weights=False, update_only=name == "b"), name)
    model.double().eval()
    logits = []
    for order in (["a", "b"], ["b", "a"]):
        model.set_adapter(order)
        logits.append(model(**batch, language_pairs=pairs).logits)
    torch.testing.assert_close(*logits)
    for i, pair in enumerate(PAIRS if pairs == PAIRS else [pairs]):
        reference = copy.deepcopy(plain)
        with torch.no_grad():
            for name in masks["a"].rows:
                layer, weight = model.get_submodule(name), reference.get_submodule(name).weight
                weight += layer.delta("a") + layer.delta("b") * masks["b"].row(pair, name)[:, None]
                weight *= masks["a"].row(pair, name)[:, None]
        torch.testing.assert_close(logits[0][i], reference(**batch).logits[i], rtol=1e-10, atol=1e-10)


def test_adapter_names_route_samples_to_it():
    model, batch = make_m2m100(), make_batch()
    adapted = updated(model, make_masks(model)).eval()
    names = ["default", "__base__", "default", "__base__"]
    mixed = adapted(**batch, adapter_names=names, language_pairs=PAIRS).logits
    together = adapted(**batch, language_pairs=PAIRS).logits
    with adapted.disable_adapter():
        base = adapted(**batch).logits
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], (base if name == "__base__" else together)[i], rtol=1e-4, atol=1e-5)


def test_it_is_saved_and_loaded(tmp_path):
    model, batch = make_m2m100(), make_batch()
    adapted = updated(copy.deepcopy(model), make_masks(model)).eval()
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    assert loaded.peft_config["default"].update_only
    assert "No neuron of the base is masked" in (tmp_path / "README.md").read_text()
    for pairs in ("en-de", PAIRS):
        assert loaded(**batch, language_pairs=pairs).logits.equal(adapted(**batch, language_pairs=pairs).logits)
    model.load_adapter(str(tmp_path), adapter_name="again")
    torch.testing.assert_close(
        model(**batch, language_pairs=PAIRS).logits, loaded(**batch, language_pairs=PAIRS).logits
    )


@pytest.mark.usefixtures("small_batches_run_compact")
def test_its_weights_do_not_replace_those_of_an_adapter_that_masks(tmp_path):
    model, masks = make_m2m100(), make_masks(make_m2m100())
    settings = {"masks": masks, "init_weights": False, "task_type": "SEQ_2_SEQ_LM"}
    get_peft_model(make_m2m100(), ns.NeuronSpecializationConfig(**settings)).save_pretrained(tmp_path)
    adapted = get_peft_model(model, ns.NeuronSpecializationConfig(**settings, update_only=True))
    with pytest.raises(ValueError, match="update_only=False, and cannot replace those of 'default'.*update_only=True"):
        adapted.load_adapter(str(tmp_path), "default")


def test_it_runs_masked_and_says_why_it_cannot_be_compact(recwarn):
    model, batch = make_m2m100(), make_batch()
    adapted = updated(model, make_masks(model)).eval()
    adapted(**batch, language_pairs="en-de")
    assert not [w for w in recwarn if "not compact" in str(w.message)], "nothing was asked for that is not possible"
    with pytest.raises(ValueError, match="cannot be cut to one pair: update_only=True.*Merge the pair instead"):
        ns.compact(adapted, "en-de")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"trainable": "full"}, "needs trainable='delta' or 'low_rank'; got 'full'"),
        ({"trainable": "none"}, "needs trainable='delta' or 'low_rank'; got 'none'"),
        ({"mask_bias": True}, "mask_bias=True has no meaning with it"),
        ({"execution": "compact"}, "execution='compact' has no meaning with it"),
    ],
)
def test_what_contradicts_it_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        ns.NeuronSpecializationConfig(update_only=True, **config)
