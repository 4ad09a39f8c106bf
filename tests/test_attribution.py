"""Attribution: |a · ∂L/∂a| of every neuron, summed over positions, in the place of counts."""

import pytest
import torch
from peft import get_peft_model

import neuron_specialization as ns
from neuron_specialization.translation.identification import record_corpus

from . import architectures
from .conftest import PAIRS, make_batch, make_m2m100, make_masks, make_t5


def by_hand(model, batch):
    """Sum |a · ∂L/∂a| with one backward pass for each sentence by itself: block name → float64 [d_ff]."""
    blocks = ns.find_ffn_blocks(model)
    total = {block.name: torch.zeros(block.d_ff, dtype=torch.float64) for block in blocks}
    for i in range(len(batch["labels"])):
        source = batch["input_ids"][i : i + 1, : int(batch["attention_mask"][i].sum())]
        target = batch["labels"][i : i + 1, : int((batch["labels"][i] != -100).sum())]
        emitted = {}
        handles = [
            block.down.register_forward_pre_hook(
                lambda m, args, name=block.name, into=emitted: into.update({name: args[0]})
            )
            for block in blocks
        ]
        log_p = model(input_ids=source, labels=target).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        for values in emitted.values():
            values.retain_grad()
        (-log_p.gather(1, target[0].unsqueeze(1)).sum()).backward()
        for name, values in emitted.items():
            total[name] += (values * values.grad).abs().sum((0, 1)).detach()
    return total


@pytest.mark.parametrize("make, pad", [(make_m2m100, 1), (make_t5, 0)], ids=["relu", "gated"])
def test_scores_are_those_of_a_backward_pass_by_hand(make, pad):
    """Summed over padded batches, with frozen parameters: no sentence and no padding changes another's scores."""
    model = make().double()
    batches = [make_batch(pad=pad), make_batch(seed=1, batch=3, pad=pad)]
    first, second = (by_hand(model, batch) for batch in batches)
    model.zero_grad()
    model.requires_grad_(False)
    scores = ns.record_attribution(model, {"en-de": batches, "de-en": batches[1:]}, progress=False)
    for name, of_pairs in scores.counts.items():
        assert of_pairs.dtype == torch.float64
        torch.testing.assert_close(of_pairs[0], first[name] + second[name], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(of_pairs[1], second[name], rtol=1e-10, atol=1e-14)
    counts = ns.record_activations(model, {"en-de": batches, "de-en": batches[1:]}, progress=False)
    assert all(scores.tokens[stack].equal(tokens) for stack, tokens in counts.tokens.items())


def test_scores_that_overflowed_are_refused_by_name():
    model = make_m2m100()
    with torch.no_grad():
        model.model.decoder.layers[1].fc2.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"attribution of .* is not finite for en-de: values overflowed"):
        ns.record_attribution(model, {"en-de": [make_batch()]}, progress=False)


def test_of_gated_blocks_it_is_that_of_the_gate_too():
    """h = g · u, and so h ∂L/∂h = g ∂L/∂g: what the mask silences is what is scored."""
    model, batch = make_t5().double(), make_batch(pad=0)
    block = ns.find_ffn_blocks(model)[-1]
    seen = []
    handle = block.gate.register_forward_hook(lambda m, args, output: seen.append(output))
    logits = model(**batch).logits
    handle.remove()
    (gate,) = seen
    real = batch["labels"] != -100
    loss = -logits.log_softmax(-1)[real].gather(1, batch["labels"][real].unsqueeze(1)).sum()
    of_loss = torch.autograd.grad(loss, gate)[0]
    before = gate.detach().requires_grad_()
    activated = block.activation(before)
    slope = torch.autograd.grad(activated.sum(), before)[0]
    expected = (activated.detach() * of_loss / slope)[real].abs().sum(0)
    scores = ns.record_attribution(model, {"en-de": [batch]}, progress=False)
    torch.testing.assert_close(scores.counts[block.name][0], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["nllb-moe", "switch_transformers"])
def test_experts_are_scored_and_padding_does_not_spread(name):
    torch.manual_seed(0)
    model = architectures.ARCHITECTURES[name].build().double().eval()
    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            module.dtype = torch.float64  # in float32 the last digits depend on the processor and the batch's shape
    batch = make_batch(pad=model.config.pad_token_id)
    one_by_one = [
        {
            "input_ids": batch["input_ids"][i : i + 1, : 9 - i % 4],
            "attention_mask": batch["attention_mask"][i : i + 1, : 9 - i % 4],
            "labels": batch["labels"][i : i + 1, : 7 - i % 3],
        }
        for i in range(4)
    ]
    together, apart = (ns.record_attribution(model, {"en-de": part}, progress=False) for part in ([batch], one_by_one))
    for block, scores in together.counts.items():
        torch.testing.assert_close(scores, apart.counts[block], rtol=1e-8, atol=1e-12)
    assert all(scores.isfinite().all() for scores in together.counts.values())


def test_the_model_is_left_as_it_was():
    model = make_m2m100().train()
    model.model.shared.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    ns.record_attribution(model, {"en-de": [make_batch()]}, progress=False)
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_adapter_is_scored_under_its_masks():
    model = make_m2m100()
    masks = make_masks(model, k=0.4)
    config = ns.NeuronSpecializationConfig(masks=masks, trainable="none", mask_bias=True, task_type="SEQ_2_SEQ_LM")
    adapted = get_peft_model(model, config)
    batches = {pair: [{**make_batch(), "language_pairs": [pair]}] for pair in PAIRS}
    scores = ns.record_attribution(adapted, batches, progress=False)
    for name, of_pairs in scores.counts.items():
        block = name.removeprefix("base_model.model.")
        for pair, row in zip(PAIRS, of_pairs, strict=True):
            assert not row[~masks.row(pair, block)].any(), "a silent neuron has no part in the loss"
            assert row[masks.row(pair, block)].any()


def test_selectors_work_on_it_and_say_so(tmp_path):
    model = make_m2m100()
    batches = {pair: [make_batch(seed=i)] for i, pair in enumerate(PAIRS)}
    scores = ns.record_attribution(model, batches, progress=False)
    scores.save(tmp_path / "scores.safetensors")
    loaded = ns.ActivationCounts.load(tmp_path / "scores.safetensors")
    masks = ns.CumulativeThreshold(0.6).select(loaded)
    assert masks.selector["measure"] == "attribution"
    for name, of_pairs in scores.counts.items():
        for pair, row in zip(PAIRS, of_pairs, strict=True):
            kept = row[masks.row(pair, name)]
            assert kept.sum() >= 0.6 * row.sum() > kept.sum() - kept.min(), "the smallest prefix"
    counts = ns.record_activations(model, batches, progress=False)
    assert "measure" not in ns.CumulativeThreshold(0.6).select(counts).selector
    with pytest.raises(ValueError, match="one measure, got attribution and activity"):
        _ = scores + counts
    twice = scores + loaded
    assert all(twice.counts[name].equal(2 * row) for name, row in scores.counts.items())


def test_a_corpus_is_scored_like_its_batches(toy_model, toy_tokenizer, toy_data):
    rows = {pair: data.select(range(6)) for pair, data in toy_data["validation"].items()}
    options = {"measure": "attribution", "batch_size": 4}
    whole = record_corpus(toy_model.double(), toy_tokenizer, rows, **options)
    parts = record_corpus(toy_model.double(), toy_tokenizer, rows, **{**options, "batch_size": 6})
    assert whole.measure == "attribution" and whole.language_token_ids
    for name, scores in whole.counts.items():
        torch.testing.assert_close(scores, parts.counts[name], rtol=1e-9, atol=1e-13)
    with pytest.raises(ValueError, match="with count_padding"):
        record_corpus(toy_model, toy_tokenizer, rows, measure="attribution", count_padding=True)
    with pytest.raises(ValueError, match="every batch needs labels"):
        ns.record_attribution(toy_model, {"en-de": [{"input_ids": torch.ones(1, 2, dtype=torch.int64)}]})
