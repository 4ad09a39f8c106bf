"""The masked path on what may stand below or around it: offloaded and quantized layers, LoRA, several adapters."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import LoraConfig

import neuron_specialization as ns

from .conftest import PAIRS, make_batch, make_m2m100, make_masks
from .test_adapter import adapt


def added(model, masks, **config):
    """Inject as transformers does, which allows other adapters beside."""
    model.add_adapter(ns.NeuronSpecializationConfig(masks=masks, init_weights=False, **config), "masks")
    return model.eval()


@pytest.mark.parametrize("pairs", ["en-de", PAIRS], ids=["one pair", "mixed"])
@pytest.mark.filterwarnings("ignore:FFN blocks run masked")
def test_lora_on_a_masked_projection_is_masked_or_refused(pairs):
    masks, batch = make_masks(make_m2m100()), {**make_batch(), "language_pairs": pairs}
    lora = LoraConfig(target_modules=["fc1"], init_lora_weights=False)
    model = added(make_m2m100(), masks)
    expected = model(**batch).logits
    model.add_adapter(lora, "lora")
    model.set_adapter(["masks", "lora"])
    with pytest.raises(ValueError, match="'lora' was added to a masked projection after the masks.*before the masks"):
        model(**batch)
    model.set_adapter("masks")
    assert model(**batch).logits.equal(expected), "an adapter that is not active does no harm"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("trainable", ["none", "delta"])
@pytest.mark.parametrize("what", ["all", "fc1"])
@pytest.mark.filterwarnings("ignore:FFN blocks run masked")
def test_offloaded_models_run_masked(what, trainable, when):
    def offload(model):
        if what == "all":
            return cpu_offload(model, torch.device("cpu"))
        for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
            linear = getattr(layer.fc1, "base_layer", layer.fc1)
            weights = {name: value.detach().clone() for name, value in linear.state_dict().items()}
            add_hook_to_module(linear, AlignDevicesHook("cpu", offload=True, weights_map=weights))
        return model

    masks = make_masks(make_m2m100())
    torch.manual_seed(3)
    reference = added(make_m2m100(), masks, trainable=trainable)
    torch.manual_seed(3)
    if when == "before":
        model = added(offload(make_m2m100()), masks, trainable=trainable)
    else:
        model = offload(added(make_m2m100(), masks, trainable=trainable))
    with torch.no_grad():
        for pairs in ("en-de", PAIRS):
            found, expected = (m(**make_batch(), language_pairs=pairs).logits for m in (model, reference))
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("pairs", ["en-de", PAIRS], ids=["one pair", "mixed"])
@pytest.mark.filterwarnings("ignore:FFN blocks run masked")
def test_offloaded_models_generate_with_the_tags_of_their_pairs(pairs):
    masks, ids = make_masks(make_m2m100()), {"en": 50, "de": 51, "fr": 52}
    reference, model = (added(make_m2m100(), masks, trainable="none", language_token_ids=ids) for _ in range(2))
    cpu_offload(model, torch.device("cpu"))
    call = {"input_ids": make_batch()["input_ids"] % 50, "language_pairs": pairs, "max_new_tokens": 4}
    assert model.generate(**call).equal(reference.generate(**call))


@pytest.mark.parametrize("how", ["offloaded", "quantized"])
@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore:.*deprecat")
def test_offloaded_and_quantized_models_are_recorded(how):
    batches = {"en-de": [make_batch()]}
    expected = ns.record_activations(make_m2m100(), batches, progress=False).counts
    if how == "offloaded":
        found = ns.record_activations(cpu_offload(make_m2m100(), torch.device("cpu")), batches, progress=False).counts
        assert all(found[name].equal(counts) for name, counts in expected.items())
    else:
        model = torch.ao.quantization.quantize_dynamic(make_m2m100(), {torch.nn.Linear}, dtype=torch.qint8)
        found = ns.record_activations(model, batches, progress=False).counts
        assert all((found[name] - counts).abs().float().mean() < 1 for name, counts in expected.items())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.filterwarnings("ignore:FFN blocks run masked", "ignore:.*quantiz", "ignore:.*deprecat")
def test_dynamically_quantized_layers_run_masked(when):
    def quantize(model):
        return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)

    masks, batch = make_masks(make_m2m100()), make_batch()
    model = make_m2m100()
    model = added(quantize(model), masks) if when == "before" else quantize(added(model, masks, trainable="none"))
    reference = added(make_m2m100(), masks, trainable="none")
    if when == "before":
        for name, delta in model.named_parameters():
            delta.data.zero_() if "delta" in name else None
    for pairs in ("en-de", PAIRS):
        found, expected = (m(**batch, language_pairs=pairs).logits for m in (model, reference))
        assert (found - expected).norm() / expected.norm() < 0.05
        other = reference(**batch, language_pairs=PAIRS[::-1]).logits
        assert (found - other).norm() / expected.norm() > 0.1


def two_adapters(mask_bias=(False, False), **first):
    model = make_m2m100()
    for name, seed, masks_bias, config in (("a", 0, mask_bias[0], first), ("b", 5, mask_bias[1], {})):
        torch.manual_seed(seed)
        settings = {"masks": make_masks(make_m2m100(), seed=seed), "mask_bias": masks_bias, **config}
        model.add_adapter(ns.NeuronSpecializationConfig(init_weights=False, **settings), name)
    return model.eval()


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
def test_an_adapter_that_leaves_a_sample_to_the_base_does_not_undo_the_other(order):
    """A knows two of the pairs, B all: the others run B alone."""
    model = two_adapters(masks=make_masks(make_m2m100(), PAIRS[:2]), default_pair="base")
    batch = make_batch()
    model.set_adapter("b")
    alone = model(**batch, language_pairs=PAIRS).logits
    model.set_adapter(order)
    together = model(**batch, language_pairs=PAIRS).logits
    torch.testing.assert_close(together[2:], alone[2:], rtol=1e-4, atol=1e-5)
    for i, pair in enumerate(PAIRS):
        one = {name: value[i : i + 1] for name, value in batch.items()}
        expected = model(**one, language_pairs=pair).logits
        torch.testing.assert_close(together[i : i + 1], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[:2], alone[:2], atol=1e-3)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("mask_bias", [(True, False), (False, True)])
def test_the_order_of_two_adapters_does_not_matter(mask_bias):
    model, batch = two_adapters(mask_bias), make_batch()
    logits = []
    for order in (["a", "b"], ["b", "a"]):
        model.set_adapter(order)
        logits.append(model(**batch, language_pairs=PAIRS).logits)
    torch.testing.assert_close(*logits)


def test_pair_ids_work_beside_adapter_names_as_names_do():
    """The second adapter has no pair 3, and needs none: no sample of its own is of that pair."""
    model = make_m2m100()
    adapted = adapt(model, make_masks(model), init_weights=False)
    few = ns.NeuronSpecializationConfig(
        masks=make_masks(make_m2m100(), PAIRS[:2]), init_weights=False, task_type="SEQ_2_SEQ_LM"
    )
    adapted.add_adapter("few", few)
    adapted.eval()
    names = ["default", "few", "__base__", "default"]
    by_name = adapted(**make_batch(), adapter_names=names, language_pairs=["en-fr", "de-en", "en-de", "fr-en"]).logits
    by_id = adapted(**make_batch(), adapter_names=names, language_pairs=torch.tensor([2, 1, 0, 3])).logits
    assert by_id.equal(by_name)
    with pytest.raises(ValueError, match="Expected pair ids from 0 to 1"):
        adapted(**make_batch(), adapter_names=names, language_pairs=torch.tensor([2, 3, 0, 3]))
