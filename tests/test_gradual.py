"""Masks that shrink while the model trains: schedule, protection of rows, resuming, and what is saved."""

import copy

import pytest
import torch
from transformers import TrainerCallback

import neuron_specialization as ns
from neuron_specialization.baselines.gradual import GradualMasks, gradual, k_at
from neuron_specialization.neurons.adapter_file import unpack_rows
from neuron_specialization.translation.training import fit

from .test_training import StopAfter, arguments, weights, with_dropout

K = 0.4
UPDATES, FINAL = 8, 4  # the masks are final from the middle on


def test_the_schedule_is_cubic_and_ends_at_k_in_the_middle():
    ks = [k_at(K, update, 200) for update in range(200)]
    assert ks[:11] == [1.0] * 11 and ks[100:] == [K] * 100
    assert all(after < before for before, after in zip(ks[10:100], ks[11:101], strict=True))
    assert 1 - ks[55] == pytest.approx((1 - K) * (1 - (1 - (55 / 200 - 0.05) / 0.45) ** 3))
    assert [k_at(K, update, 2) for update in range(2)] == [1.0, K] and k_at(K, 0, 1) == K


class Watch(TrainerCallback):
    """Note the masks and the weights that each update begins with."""

    def __init__(self, model):
        self.model, self.masks, self.weights = model, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.masks.append(current_masks(self.model))
        self.weights.append(weights(self.model))


def current_masks(model):
    base = model.get_base_model()
    layers = {name: base.get_submodule(name) for name in model.peft_config["default"].d_ff}
    packed = {name: layer.neuron_specialization_mask["default"] for name, layer in layers.items()}
    return {name: unpack_rows(p, layers[name].out_features) for name, p in packed.items()}


def train(model, tokenizer, data, directory, stop_after=None, **changes):
    """Train under shrinking masks; return the trained model, what was watched and the result of `fit`."""
    counts = ns.record_corpus(model, tokenizer, data["validation"])
    adapted = gradual(with_dropout(copy.deepcopy(model)), counts, K)
    watch = Watch(adapted)
    callbacks = [GradualMasks(adapted, counts, K), watch]
    if stop_after is not None:
        callbacks.append(StopAfter(stop_after))
    options = {"max_steps": UPDATES, "eval_steps": 2, "weight_decay": 0.1, "save_total_limit": 10, **changes}
    args = arguments(directory, **options)
    small = {pair: rows.select(range(8)) for pair, rows in data["validation"].items()}
    result = fit(adapted, tokenizer, data["train"], small, args, callbacks=callbacks)
    return adapted, watch, result


def test_masks_shrink_to_those_of_k_and_rows_stay_where_they_are_masked(
    toy_model, toy_tokenizer, toy_data, tmp_path, small_batches_run_compact
):
    adapted, watch, result = train(toy_model, toy_tokenizer, toy_data, tmp_path)
    counts = ns.record_corpus(toy_model, toy_tokenizer, toy_data["validation"])
    final = ns.CumulativeThreshold(K).select(counts)
    kept = [sum(int(rows.sum()) for rows in masks.values()) for masks in watch.masks]
    assert kept[0] > kept[2] > kept[FINAL] == kept[-1]
    for name, rows in final.rows.items():
        key = f"base_model.model.{name}.base_layer.weight"
        moved_later = torch.zeros(rows.shape[1], dtype=torch.bool)
        for before, after, w, moved in zip(
            watch.masks, watch.masks[1:], watch.weights, watch.weights[1:], strict=False
        ):
            assert (before[name] | ~after[name]).all(), "no neuron comes back"
            unselected = ~before[name].any(0)
            assert moved[key][unselected].equal(w[key][unselected])
            moved_later |= unselected & (w[key] != watch.weights[0][key]).any(1)
        assert watch.masks[-1][name].equal(rows)
        assert moved_later.any(), "rows that some pair selected before trained until then"
    saved = ns.NeuronMasks.from_pretrained(tmp_path / "adapter")
    assert all(saved.rows[name].equal(rows) for name, rows in final.rows.items())
    assert saved.selector["name"] == "gradual" and saved.selector["k"] == K
    assert all(rows.equal(final.rows[name]) for name, rows in current_masks(adapted).items())


def test_the_best_validation_loss_is_one_of_the_final_masks(toy_model, toy_tokenizer, toy_data, tmp_path):
    """A learning rate that destroys more and more: the lowest loss is measured under larger masks."""
    options = {"learning_rate": 3.0, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": UPDATES}
    _, _, result = train(toy_model, toy_tokenizer, toy_data, tmp_path, **options)
    losses = {entry["step"]: entry["eval_loss"] for entry in result["log"] if "eval_loss" in entry}
    assert min(losses.values()) < min(loss for step, loss in losses.items() if step > FINAL), (
        "not what the test is about"
    )
    assert result["best_validation_loss"] == min(loss for step, loss in losses.items() if step > FINAL)


def test_resumed_runs_end_like_an_uninterrupted_one(toy_model, toy_tokenizer, toy_data, tmp_path):
    """Cut off while the masks shrink, and afterwards."""
    whole, watched, result = train(toy_model, toy_tokenizer, toy_data, tmp_path / "whole")
    for stop_after in (3, 5):
        directory = tmp_path / f"cut-{stop_after}"
        with pytest.raises(KeyboardInterrupt):
            train(toy_model, toy_tokenizer, toy_data, directory, stop_after)
        resumed, rest, again = train(toy_model, toy_tokenizer, toy_data, directory)
        assert len(rest.masks) == UPDATES - (stop_after - 1), "it went on from the last checkpoint"
        for masks, expected in zip(reversed(rest.masks), reversed(watched.masks), strict=False):
            assert all(rows.equal(expected[name]) for name, rows in masks.items())
        for name, weight in weights(whole).items():
            assert weights(resumed)[name].equal(weight), name
        assert again["best_validation_loss"] == result["best_validation_loss"]
        assert all(rows.equal(current_masks(whole)[name]) for name, rows in current_masks(resumed).items())
    loaded, not_trained, finished = train(toy_model, toy_tokenizer, toy_data, tmp_path / "whole")
    assert finished["finished_before"] and not not_trained.masks
    assert all(rows.equal(current_masks(whole)[name]) for name, rows in current_masks(loaded).items())
