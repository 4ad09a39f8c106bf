"""What benchmarks rest on: times in turns, work and memory that agree with what can be counted by hand."""

import copy
import time

import pytest
import torch
from peft import get_peft_model
from torch import nn

import neuron_specialization as ns
from neuron_specialization.analysis.memory import measured_memory, training_memory
from neuron_specialization.analysis.shapes import ModelShape, numbered_words, random_batch, random_masks
from neuron_specialization.analysis.timing import TrainingStep, compare, side_by_side, work
from neuron_specialization.neurons.language_pairs import Routes
from neuron_specialization.translation.checkpoints import new_m2m100

from .conftest import make_batch, make_m2m100
from .test_recipes import ROOT

SHAPE = ModelShape(layers=2, d_model=32, d_ff=64, vocab_size=200)


def adapted(base, trainable):
    masks = random_masks(make_shape(), Routes.per_pair(["a-b", "c-d"]), 0.7)
    model = get_peft_model(base, ns.NeuronSpecializationConfig(masks=masks, trainable=trainable))
    model.set_language_pair("a-b")
    return model


def make_shape():
    torch.manual_seed(0)
    return new_m2m100(**vars(SHAPE))


def test_functions_take_turns():
    calls = []
    times = side_by_side({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=2, warmup=1)
    assert "".join(calls) == "abbaab" and [len(times[name]) for name in ("a", "b")] == [2, 2]


def test_a_comparison_is_the_median_ratio_within_rounds(monkeypatch):
    now = 0.0
    durations = {"ours": iter([9, 1, 2, 30]), "dense": iter([9, 4, 4, 40]), "lora": iter([9, 1, 1, 1])}

    def take(name):
        nonlocal now
        now += next(durations[name])

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    functions = {name: lambda name=name: take(name) for name in durations}
    dense, lora = compare("something", functions, {"dense": "<= 0.6"}, repeats=3)
    assert dense["ratio"] == 2 / 4 and dense["rounds"] == "0.25 to 0.75" and dense["ms"] == 2000
    assert (dense["compared with"], dense["target"]) == ("dense", "<= 0.6")
    assert lora["ratio"] == 2 and lora["target"] == ""


def test_work_counts_operations_and_weights_read():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    flops, read = work(lambda: [model(torch.randn(5, 8)) for _ in range(3)])
    assert flops == 3 * 5 * 2 * (8 * 16 + 16 * 4) and read == 3 * 4 * (8 * 16 + 16 * 4)
    assert not nn.modules.module._global_forward_pre_hooks


def test_counting_on_the_host_gives_the_counts_of_the_recorder(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from benchmark_cases.identification import count_on_host

    model, batch = make_m2m100(), make_batch(batch=2)
    ours = ns.record_activations(model, {"en-de": [batch]}, count_padding=True, progress=False)
    reference = count_on_host(model, batch)
    for name, counts in reference.items():
        assert counts.equal(ours.counts[name][0]), name


@pytest.mark.parametrize("trainable", ["dense", "delta", "low_rank", "full"])
def test_computed_memory_is_what_training_holds(trainable):
    """Beside it: AdamW's step counters, 4 bytes per tensor, and the header of the file."""
    with torch.device("meta"):
        shape = new_m2m100(**vars(SHAPE))
    base = make_shape()
    computed = training_memory(shape if trainable == "dense" else adapted(shape, trainable))
    model = base if trainable == "dense" else adapted(base, trainable)
    measured = measured_memory(TrainingStep(model, random_batch(base, 4, 8)))
    assert measured["weights"] == computed["weights"] and measured["gradients"] == computed["gradients"]
    tensors = sum(p.requires_grad for p in model.parameters())
    assert measured["optimizer"] == computed["optimizer"] + 4 * tensors
    assert computed["file"] < measured["file"] < computed["file"] + 300 * (len(list(model.parameters())) + 10)
    assert measured["peak"] > measured["weights"] + measured["optimizer"] + measured["gradients"]


def test_the_peak_grows_with_the_batch():
    base = make_shape()
    small, large = (
        measured_memory(TrainingStep(copy.deepcopy(base), random_batch(base, size, 16)))["peak"] for size in (4, 64)
    )
    logits = 16 * 200 * 4
    assert large - small > 60 * logits


def test_numbered_words_are_the_tokens_of_random_batches():
    tokenizer = numbered_words(200)
    assert len(tokenizer) == 200 and tokenizer("w4 w199 w200").input_ids == [4, 199, 3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (1, 2)
