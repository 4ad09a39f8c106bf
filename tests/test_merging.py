"""Merging, and rows of W1 that no pair selects: what is refused changes nothing."""

import copy

import pytest
import torch
from peft import get_peft_model

import neuron_specialization as ns

from .conftest import make_batch, make_m2m100, make_masks


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


def test_the_untouched_base_is_not_merged_as_if_it_were_a_pair():
    adapted = adapt(make_m2m100(), default_pair="base", init_weights=False)
    for pair in (None, "base", "en-it"):
        adapted.set_language_pair(pair)
        with pytest.raises(ValueError, match="is the untouched base. Choose a pair"):
            adapted.merge_adapter()


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
                parameter.copy_(copy_)


def train(adapted, optimizer, steps=2, **call):
    for step in range(steps):
        adapted(**make_batch(seed=step), **call).loss.backward()
        optimizer.step()


def unselected(masks, name):
    return ~masks.rows[name].any(0)


@pytest.mark.parametrize("make", [MasterWeights, lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1)])
def test_rows_that_no_pair_selects_are_saved_unmoved(make, tmp_path):
    model = make_m2m100()
    masks = make_masks(model, ["en-de"], k=0.4)
    before = {name: model.get_submodule(name).weight.detach().clone() for name in masks.rows}
    adapted = adapt(model, masks, trainable="full").train()
    train(adapted, make(adapted.parameters()))
    adapted.save_pretrained(str(tmp_path))
    for name, weight in before.items():
        rest = unselected(masks, name)
        now = adapted.get_submodule(f"base_model.model.{name}").weight
        assert rest.any() and now[rest].equal(weight[rest]) and not now[~rest].equal(weight[~rest])


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
    first = layer.unselected_rows()
    assert layer.unselected_rows() is first
    with torch.no_grad():
        layer.neuron_specialization_mask["default"][:] = 1  # keeps every eighth neuron
    assert layer.unselected_rows() is not first and len(layer.unselected_rows()) == 20 - 3
