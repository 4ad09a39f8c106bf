"""Merging, and rows of W1 that no pair selects: what is refused changes nothing."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

import neuron_specialization as ns

from .conftest import PAIRS, make_batch, make_m2m100, make_masks


def adapt(model, masks=None, **config):
    masks = masks if masks is not None else make_masks(model)
    return get_peft_model(model, ns.NeuronSpecializationConfig(masks=masks, task_type="SEQ_2_SEQ_LM", **config))


def tie_stacks(model):
    """Let the first layers of encoder and decoder share fc1's weight, in modules of their own."""
    model.model.decoder.layers[0].fc1.weight = model.model.encoder.layers[0].fc1.weight
    return model


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_refused_merge_leaves_the_model_as_it_was(merge):
    batch = make_batch()
    adapted = adapt(make_m2m100(), init_weights=False).eval()
    expected = adapted(**batch, language_pairs="en-de").logits
    with pytest.raises(ValueError, match="none was chosen"):
        getattr(adapted, merge)()
    assert adapted(**batch, language_pairs="en-de").logits.equal(expected), "compact execution still works"
    with torch.no_grad():  # the last layer cannot be merged, the others could
        adapted.get_submodule("base_model.model.model.decoder.layers.1.fc1").neuron_specialization_delta[
            "default"
        ].fill_(float("nan"))
    adapted.set_language_pair("en-de")
    weights = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    with pytest.raises(ValueError, match="NaNs detected"):
        getattr(adapted, merge)(safe_merge=True)
    assert all(tensor.equal(weights[name]) or tensor.isnan().any() for name, tensor in adapted.state_dict().items())
    assert not any(getattr(module, "merged", False) for module in adapted.modules())


def test_masks_over_another_adapter_are_not_merged_without_it():
    """They mask its update too, which is not in the weights."""
    base = inject_adapter_in_model(LoraConfig(target_modules=["fc1"], init_lora_weights=False), make_m2m100()).eval()
    adapted = adapt(base, make_masks(make_m2m100(), ("en-de",))).eval()
    expected = adapted(**make_batch()).logits
    with pytest.raises(ValueError, match="between the masks and their linear layer is a Linear of another adapter"):
        adapted.merge_adapter()
    assert adapted(**make_batch()).logits.equal(expected)
    for module in base.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(**make_batch()).logits, expected)


def test_merging_a_second_adapter_leaves_the_first_under_its_pair():
    adapted = adapt(make_m2m100(), init_weights=False).eval()
    adapted.add_adapter("b", ns.NeuronSpecializationConfig(masks=make_masks(make_m2m100(), seed=9)))
    layers = [module for module in adapted.modules() if hasattr(module, "merged_rows")]
    for adapter, pair in (("default", "en-de"), ("b", "fr-en")):
        adapted.set_language_pair(pair)
        adapted.merge_adapter([adapter])
    rows = {name: PAIRS.index(pair) for name, pair in (("default", "en-de"), ("b", "fr-en"))}
    assert all(layer.merged_rows == rows for layer in layers)


def test_a_refused_merge_keeps_no_backup_that_a_later_one_would_put_back():
    adapted = adapt(make_m2m100(), trainable="full")
    with pytest.raises(ValueError, match="none was chosen"):
        adapted.merge_adapter()
    layer = adapted.get_submodule("base_model.model.model.encoder.layers.0.fc1")
    with torch.no_grad():
        layer.weight.add_(1)  # trained on
    trained = layer.weight.detach().clone()
    adapted.set_language_pair("en-de")
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    assert layer.weight.equal(trained)


def test_what_is_merged_into_a_trained_base_is_not_saved_as_the_base(tmp_path):
    """The rows of all other pairs would be zero for good."""
    adapted = adapt(make_m2m100(), trainable="full").eval()
    expected = adapted(**make_batch(), language_pairs="fr-en").logits
    adapted.set_language_pair("en-de")
    adapted.merge_adapter()
    with pytest.raises(ValueError, match="merged into them.*unmerge_adapter"):
        adapted.save_pretrained(str(tmp_path))
    adapted.unmerge_adapter()
    adapted.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(make_m2m100(), str(tmp_path))
    torch.testing.assert_close(loaded(**make_batch(), language_pairs="fr-en").logits, expected)


def test_the_untouched_base_is_not_merged_as_if_it_were_a_pair():
    adapted = adapt(make_m2m100(), default_pair="base", init_weights=False)
    for pair in (None, "base", "en-it"):
        adapted.set_language_pair(pair)
        with pytest.raises(ValueError, match="is the untouched base. Choose a pair"):
            adapted.merge_adapter()


@pytest.mark.parametrize("how", ["passed", "selected", "mixed", "ids"])
def test_a_merged_model_refuses_other_pairs(how):
    adapted, batch = adapt(make_m2m100(), init_weights=False).eval(), make_batch()
    expected = adapted(**batch, language_pairs="en-de").logits
    with ns.language_pair(adapted, "en-de"):
        adapted.merge_adapter()
    for call in ({}, {"language_pairs": "en-de"}, {"language_pairs": torch.tensor([0])}):
        torch.testing.assert_close(adapted(**batch, **call).logits, expected)
    if how == "selected":
        adapted.set_language_pair("fr-en")
    pairs = {"passed": "fr-en", "mixed": PAIRS, "ids": torch.tensor([3]), "selected": None}[how]
    with pytest.raises(ValueError, match="Another language pair .* is merged.*unmerge_adapter"):
        adapted(**batch, language_pairs=pairs)


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.filterwarnings("ignore:FFN blocks run masked")
def test_an_offloaded_model_is_merged(unload):
    adapted, batch = adapt(make_m2m100(), init_weights=False).eval(), make_batch()
    expected = adapted(**batch, language_pairs="en-de").logits
    adapted.set_language_pair("en-de")
    cpu_offload(adapted, torch.device("cpu"))
    if unload:
        merged = adapted.merge_and_unload()
    else:
        adapted.merge_adapter()
        merged = adapted
    torch.testing.assert_close(merged(**batch).logits, expected)


def test_what_was_merged_and_cast_is_unmerged_in_the_new_type():
    adapted = adapt(make_m2m100(), init_weights=False)
    expected = {
        name: weight.to(torch.bfloat16) for name, weight in adapted.state_dict().items() if "base_layer" in name
    }
    adapted.set_language_pair("en-de")
    adapted.merge_adapter()
    adapted.to(torch.bfloat16)
    adapted.unmerge_adapter()
    assert all(adapted.state_dict()[name].equal(weight) for name, weight in expected.items())


def test_tied_projections_are_not_merged():
    model = tie_stacks(make_m2m100(decoder_ffn_dim=20))
    adapted = adapt(model, init_weights=False)
    before = copy.deepcopy(adapted.state_dict())
    adapted.set_language_pair("en-de")
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(ValueError, match="encoder.layers.0.fc1 and .*decoder.layers.0.fc1 share one weight"):
            merge()
        assert all(tensor.equal(before[name]) for name, tensor in adapted.state_dict().items())


def test_tied_biases_are_not_merged():
    model = make_m2m100(decoder_ffn_dim=20)
    model.model.decoder.layers[0].fc1.bias = model.model.encoder.layers[0].fc1.bias
    adapted = adapt(model, init_weights=False, mask_bias=True)
    before = copy.deepcopy(adapted.state_dict())
    adapted.set_language_pair("en-de")
    with pytest.raises(ValueError, match="encoder.layers.0.fc1 and .*decoder.layers.0.fc1 share one bias"):
        adapted.merge_adapter()
    assert all(tensor.equal(before[name]) for name, tensor in adapted.state_dict().items())


class MasterWeights:
    """An optimizer on float32 copies of the parameters, which are written back after its step, as Apex does it."""

    def __init__(self, parameters):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.copies = [p.detach().clone() for p in self.parameters]
        self.inner = torch.optim.AdamW(self.copies, lr=0.05, weight_decay=0.1)

    def step(self):
        for parameter, copy_ in zip(self.parameters, self.copies, strict=True):
            copy_.grad = None if parameter.grad is None else parameter.grad.clone()
            parameter.grad = None
        self.inner.step()
        with torch.no_grad():
            for parameter, copy_ in zip(self.parameters, self.copies, strict=True):
                self.write(parameter, copy_)

    def write(self, parameter, values):
        parameter.copy_(values)


class NewTensors(MasterWeights):
    """Puts new tensors into the parameters instead of writing into theirs."""

    def write(self, parameter, values):
        parameter.data = values.clone()


class ScheduleFree(torch.optim.Optimizer):
    """Keeps a second copy of the weights, which decays too, and becomes the weights in part when it evaluates."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                state["z"] = state.get("z", parameter.clone()) * 0.9 - parameter.grad
                parameter.lerp_(state["z"], 0.5)

    @torch.no_grad()
    def eval(self):
        for parameter, state in self.state.items():
            parameter.lerp_(state["z"], 0.5)


def test_a_second_copy_of_the_weights_leaves_frozen_rows_too():
    model = make_m2m100()
    masks = make_masks(model, ["en-de"], k=0.4)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in masks.rows}
    adapted = adapt(model, masks, trainable="full").train()
    optimizer = ScheduleFree([p for p in adapted.parameters() if p.requires_grad])
    train(adapted, optimizer)
    optimizer.eval()
    for name, weight in before.items():
        rest, now = unselected(masks, name), adapted.get_submodule(f"base_model.model.{name}").weight
        assert rest.any() and now[rest].equal(weight[rest]) and not now[~rest].equal(weight[~rest])


def train(adapted, optimizer, steps=2, **call):
    for step in range(steps):
        adapted(**make_batch(seed=step), **call).loss.backward()
        optimizer.step()


def unselected(masks, name):
    return ~masks.rows[name].any(0)


def saved(adapted, tmp_path):
    adapted.save_pretrained(str(tmp_path))
    return adapted.get_base_model()


def copied(adapted, tmp_path):
    return copy.deepcopy(adapted).get_base_model()


def in_a_state_dict(adapted, tmp_path):
    base = make_m2m100()
    state = adapted.get_base_model().state_dict()
    base.load_state_dict({name: state[name.replace("fc1.", "fc1.base_layer.")] for name in base.state_dict()})
    return base


def unloaded(adapted, tmp_path):
    return adapted.unload()


def deleted(adapted, tmp_path):
    adapted.delete_adapter("default")
    return adapted.base_model.model


def merged_and_unmerged(adapted, tmp_path):
    adapted.merge_adapter()
    merged = adapted.get_base_model()(**make_batch()).logits
    adapted.unmerge_adapter()
    torch.testing.assert_close(merged, adapted(**make_batch()).logits, rtol=1e-4, atol=1e-5)
    return adapted.get_base_model()


def disabled(adapted, tmp_path):
    with adapted.disable_adapter():
        adapted(**make_batch())
    return adapted.get_base_model()


@pytest.mark.parametrize("leave", [saved, copied, in_a_state_dict, unloaded, deleted, merged_and_unmerged, disabled])
@pytest.mark.parametrize(
    "make", [MasterWeights, NewTensors, lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1)]
)
def test_rows_that_no_pair_selects_stay_unmoved(make, leave, tmp_path):
    model = make_m2m100()
    masks = make_masks(model, ["en-de"], k=0.4)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in masks.rows}
    adapted = adapt(model, masks, trainable="full").train()
    train(adapted, make(adapted.parameters()))
    base = leave(adapted, tmp_path)
    for name, weight in before.items():
        rest = unselected(masks, name)
        now = base.get_submodule(name).weight
        assert rest.any() and now[rest].equal(weight[rest]) and not now[~rest].equal(weight[~rest])


def step_another_model():
    """Its optimizer might step on copies of anybody's weights."""
    layer = torch.nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    torch.optim.AdamW(layer.parameters()).step()


def test_loading_weights_is_not_undone():
    model = make_m2m100()
    masks = make_masks(model, ["en-de"], k=0.4)
    adapted = adapt(model, masks, trainable="full").train()
    step_another_model()
    base = adapted.get_base_model()
    base.load_state_dict({name: tensor + 1 if "fc1" in name else tensor for name, tensor in base.state_dict().items()})
    loaded = copy.deepcopy(base.state_dict())
    adapted(**make_batch())
    assert all(tensor.equal(loaded[name]) for name, tensor in base.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*quantiz", "ignore:.*deprecat")
def test_a_trained_model_that_was_quantized_does_not_stop_other_training():
    adapted = adapt(make_m2m100(), trainable="full").eval()
    quantized = torch.ao.quantization.quantize_dynamic(adapted, {torch.nn.Linear}, dtype=torch.qint8)
    step_another_model()
    quantized(**make_batch(), language_pairs="en-de")


def test_every_row_trains_once_the_adapter_is_deleted_or_unloaded():
    for leave in ("delete", "unload"):
        model = make_m2m100()
        masks = make_masks(model, ["en-de"], k=0.4)
        adapted = adapt(model, masks, trainable="full").train()
        layers = [adapted.get_submodule(f"base_model.model.{name}") for name in masks.rows]  # still referred to
        if leave == "delete":
            adapted.delete_adapter("default")
            base = adapted.base_model.model
        else:
            base = adapted.unload()
        before = [layer.weight.detach().clone() for layer in layers]
        base.requires_grad_(True)
        train(base, torch.optim.AdamW(base.parameters(), lr=0.05, weight_decay=0.1))
        for layer, weight in zip(layers, before, strict=True):
            assert (layer.weight != weight).any(1).all(), leave


def test_a_row_of_a_tied_weight_trains_if_any_of_its_layers_selects_it():
    model = tie_stacks(make_m2m100(decoder_ffn_dim=20))
    encoder, decoder = "model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1"
    masks = make_masks(model, ["en-de"], k=0.4)
    before = model.get_submodule(encoder).weight.detach().clone()
    adapted = adapt(model, masks, trainable="full").train()
    train(adapted, torch.optim.AdamW(adapted.parameters(), lr=0.05, weight_decay=0.1))
    rest = unselected(masks, encoder) & unselected(masks, decoder)
    only_decoder = unselected(masks, encoder) & ~unselected(masks, decoder)
    now = adapted.get_submodule(f"base_model.model.{encoder}").weight
    assert rest.any() and only_decoder.any()
    assert now[rest].equal(before[rest]) and (now[only_decoder] != before[only_decoder]).any(1).all()


def test_masks_are_unpacked_once_and_not_in_each_step(monkeypatch):
    adapted = adapt(make_m2m100(), trainable="full").train()
    layer = adapted.get_submodule("base_model.model.model.encoder.layers.0.fc1")
    first = layer.frozen_neurons(None, torch.device("cpu"))
    assert layer.frozen_neurons(None, torch.device("cpu")) is first
    with torch.no_grad():
        layer.neuron_specialization_mask["default"][:] = 1  # keeps every eighth neuron
    assert len(layer.frozen_neurons(None, torch.device("cpu"))) == 20 - 3
