import os
import warnings

import pytest
import torch

import neuron_specialization as ns
from neuron_specialization.neurons.masks import intersection_over_union

from . import architectures
from .conftest import make_batch, make_m2m100, make_t5


def reference_counts(model, batch, projection_of, activation, count_padding=False):
    """Count by hand from captured projections: block name → int64 [d_ff]."""
    captured = {}
    handles = [
        projection_of(block).register_forward_hook(lambda m, a, out, name=block.name: captured.update({name: out}))
        for block in ns.find_ffn_blocks(model)
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    real = {"encoder": batch["attention_mask"].bool(), "decoder": batch["labels"] != -100}
    counts = {}
    for block in ns.find_ffn_blocks(model):
        active = activation(captured[block.name]) > 0
        keep = torch.ones_like(real[block.stack]) if count_padding else real[block.stack]
        counts[block.name] = active[keep].sum(0)
    return counts


@pytest.mark.parametrize("count_padding", [False, True])
def test_counts_are_those_of_a_plain_count(count_padding):
    model, batch = make_m2m100(), make_batch()
    counts = ns.record_activations(model, {"en-de": [batch]}, count_padding=count_padding, progress=False)
    expected = reference_counts(model, batch, lambda b: b.up, torch.relu, count_padding)
    for name, count in expected.items():
        assert counts.counts[name].dtype == torch.int64
        assert counts.counts[name][0].equal(count), name
    positions = batch["attention_mask"].numel() if count_padding else batch["attention_mask"].sum().item()
    assert counts.tokens["encoder"].tolist() == [positions]


def test_gated_blocks_count_the_sign_of_the_activated_gate():
    model, batch = make_t5("gated-gelu"), make_batch(pad=0)
    counts = ns.record_activations(model, {"en-de": [batch]}, progress=False)
    expected = reference_counts(model, batch, lambda b: b.gate, torch.nn.functional.gelu)
    for name, count in expected.items():
        assert counts.counts[name][0].equal(count), name
    shares = torch.cat([c[0] for c in counts.counts.values()]) / batch["attention_mask"].sum()
    assert 0.2 < shares.mean() < 0.8  # non-zero counting would give nearly 1


def padded(row, source_pad, target_pad):
    """One example of a batch, with more padding behind it."""
    pad = torch.nn.functional.pad
    return {
        "input_ids": pad(row["input_ids"], (0, source_pad), value=1),
        "attention_mask": pad(row["attention_mask"], (0, source_pad)),
        "labels": pad(row["labels"], (0, target_pad), value=-100),
    }


def one_by_one(batch, source_pad=0, target_pad=0):
    return [padded({k: v[i : i + 1] for k, v in batch.items()}, source_pad, target_pad) for i in range(4)]


def test_counts_depend_on_neither_batch_size_nor_padding():
    model, batch = make_m2m100().double(), make_batch()
    whole = ns.record_activations(model, {"en-de": [batch]}, progress=False)
    for batches in (one_by_one(batch), one_by_one(batch, 5, 3)):
        single = ns.record_activations(model, {"en-de": batches}, progress=False)
        for name, count in whole.counts.items():
            assert single.counts[name].equal(count), name
        assert all(single.tokens[stack].equal(whole.tokens[stack]) for stack in whole.tokens)


def test_float32_masks_hardly_depend_on_batch_size():
    model, batch = make_m2m100(encoder_ffn_dim=256, decoder_ffn_dim=256), make_batch()
    select = ns.CumulativeThreshold(0.8).select
    whole = select(ns.record_activations(model, {"en-de": [batch]}, progress=False))
    single = select(ns.record_activations(model, {"en-de": one_by_one(batch, 5, 3)}, progress=False))
    for name in whole.rows:
        assert intersection_over_union(whole.rows[name], single.rows[name]) >= 0.999


def test_the_same_sources_give_the_same_encoder_counts_for_every_target():
    model = make_m2m100()
    to_german = make_batch(seed=0)
    to_french = {**to_german, "labels": make_batch(seed=1)["labels"]}
    counts = ns.record_activations(model, {"en-de": [to_german], "en-fr": [to_french]}, progress=False)
    for name, count in counts.counts.items():
        assert count[0].equal(count[1]) == (counts.stacks[name] == "encoder"), name


def test_decoder_positions_without_labels():
    model, batch = make_t5("relu"), make_batch(pad=0)
    tokens = torch.tensor([[0, 5, 6, 0], [0, 7, 0, 0]])  # T5 starts with its padding token
    common = {k: batch[k][:2] for k in ("input_ids", "attention_mask")} | {"decoder_input_ids": tokens}
    counts = ns.record_activations(model, {"en-de": [common]}, progress=False)
    assert counts.tokens["decoder"].tolist() == [5]
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    counts = ns.record_activations(model, {"en-de": [{**common, "decoder_attention_mask": mask}]}, progress=False)
    assert counts.tokens["decoder"].tolist() == [4]


def test_the_head_does_not_run_and_the_model_is_left_as_it_was():
    model = make_m2m100().train()
    model.model.encoder.eval()
    ran = []
    model.lm_head.register_forward_hook(lambda *_: ran.append(1))
    ns.record_activations(model, {"en-de": [make_batch()]}, progress=False)
    assert not ran
    assert model.training and model.model.decoder.training and not model.model.encoder.training
    model(**make_batch())
    assert ran, "the hook that stops the model must be gone"


def test_adding_and_saving(tmp_path):
    model = make_m2m100()
    a = ns.record_activations(model, {"en-de": [make_batch(seed=0)]}, progress=False)
    b = ns.record_activations(model, {"en-fr": [make_batch(seed=1)], "en-de": [make_batch(seed=2)]}, progress=False)
    both = {"en-de": [make_batch(seed=0), make_batch(seed=2)], "en-fr": [make_batch(seed=1)]}
    expected = ns.record_activations(model, both, progress=False)
    total = a.merge(b)
    assert total.language_pairs == ["en-de", "en-fr"]
    total.save(tmp_path / "counts.safetensors")
    loaded = ns.ActivationCounts.load(tmp_path / "counts.safetensors")
    for name, count in expected.counts.items():
        assert total.counts[name].equal(count) and loaded.counts[name].equal(count)
    assert loaded.fingerprint == total.fingerprint and loaded.stacks == total.stacks
    other = ns.record_activations(make_m2m100(encoder_ffn_dim=24), {"en-de": [make_batch()]}, progress=False)
    with pytest.raises(ValueError, match="different models"):
        _ = a + other
    os.truncate(tmp_path / "counts.safetensors", 100)
    with pytest.raises(ValueError, match="counts.safetensors holds no activation counts.* It cannot be read"):
        ns.ActivationCounts.load(tmp_path / "counts.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source", [torch.ones(640, 128, dtype=torch.long), torch.ones(3, 87, dtype=torch.long)])
def test_counts_are_exact_under_autocast(dtype, source):
    """81,920 is more than float16 holds; 261 takes more digits than bfloat16 has."""
    model = make_m2m100(layers=1, max_position_embeddings=256)
    with torch.no_grad():
        model.model.encoder.layers[0].fc1.weight.zero_()
        model.model.encoder.layers[0].fc1.bias.fill_(1)  # every neuron is active at every position
    batch = {"input_ids": 5 * source, "attention_mask": source, "labels": torch.full((len(source), 2), 5)}
    with torch.autocast("cpu", dtype):
        counts = ns.record_activations(model, {"en-de": [batch]}, progress=False)
    assert counts.counts["model.encoder.layers.0.fc1"].unique().tolist() == [source.numel()]
    assert counts.tokens["encoder"].tolist() == [source.numel()]


@pytest.mark.parametrize("compiled", ["model", "in place", "layer"])
def test_models_that_were_compiled_and_have_run_are_counted_too(compiled):
    model, batch = make_m2m100(layers=1), make_batch()
    expected = ns.record_activations(model, {"en-de": [batch]}, progress=False)
    runs = model
    if compiled == "model":
        runs = torch.compile(model, backend="eager")
    elif compiled == "in place":
        model.compile(backend="eager")
    else:
        model.model.encoder.layers[0].compile(backend="eager")
    with torch.no_grad():
        before = runs(**batch).logits  # code compiled now knows nothing of hooks that are attached later
    counts = ns.record_activations(runs, {"en-de": [batch]}, progress=False)
    for name, count in expected.counts.items():
        assert counts.counts[name].equal(count), name
    with torch.no_grad():
        assert runs(**batch).logits.equal(before)


def test_blocks_that_compute_in_chunks_are_counted_whole():
    model, batch = architectures.make("encoder-decoder"), architectures.make_batch("encoder-decoder")
    expected = ns.record_activations(model, {"en-de": [batch]}, progress=False)
    chunked = [module for module in model.modules() if hasattr(module, "chunk_size_feed_forward")]
    for module in chunked:
        module.chunk_size_feed_forward = 1
    counts = ns.record_activations(model, {"en-de": [batch]}, progress=False)
    for name, count in expected.counts.items():
        assert counts.counts[name].equal(count), name
    assert chunked and all(module.chunk_size_feed_forward == 1 for module in chunked), "put back"


@pytest.mark.parametrize("eos", [2, 1], ids=["", "the padding token closes sentences too"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_labels_that_are_padding_tokens_are_padding(eos, padding_side):
    """As `tokenizer(..., text_target=..., padding=True)` gives them."""
    model = make_m2m100(pad_token_id=1, eos_token_id=eos)
    sentences = [[5, 6, 7, 8, eos], [5, 9, eos], [5, eos]]
    rows = [[-100] * (5 - len(s)) + s if padding_side == "left" else s + [-100] * (5 - len(s)) for s in sentences]
    ignored = torch.tensor(rows)
    batch = {"input_ids": torch.full((3, 4), 7), "attention_mask": torch.ones(3, 4), "labels": ignored}
    batch["decoder_input_ids"] = ignored.masked_fill(ignored == -100, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = ns.record_activations(model, {"en-de": [batch]}, progress=False)
    padded = {**batch, "labels": ignored.masked_fill(ignored == -100, 1)}
    with pytest.warns(UserWarning, match="labels .*padding token.*-100"):
        counts = ns.record_activations(model, {"en-de": [padded]}, progress=False)
    assert counts.tokens["decoder"].tolist() == expected.tokens["decoder"].tolist() == [10]
    for name, count in expected.counts.items():
        assert counts.counts[name].equal(count), name
    everything = ns.record_activations(model, {"en-de": [padded]}, count_padding=True, progress=False)
    assert everything.tokens["decoder"].tolist() == [15]


def test_sources_without_an_attention_mask_lose_their_padding_too():
    model, batch = make_m2m100(), make_batch()
    unmasked = {key: batch[key] for key in ("input_ids", "labels")}
    with pytest.warns(UserWarning, match="input_ids .*padding token.*attention_mask"):
        counts = ns.record_activations(model, {"en-de": [unmasked]}, progress=False)
    assert counts.tokens["encoder"].tolist() == [batch["attention_mask"].sum()]


def test_counts_print_in_one_line():
    batches = {"en-de": [make_batch()], "en-fr": [make_batch()]}
    counts = ns.record_activations(make_m2m100(), batches, progress=False)
    tokens = {stack: int(count.sum()) for stack, count in counts.tokens.items()}
    expected = f"{tokens['encoder']} encoder, {tokens['decoder']} decoder positions"
    assert repr(counts) == f"ActivationCounts of en-de, en-fr: 4 blocks, {expected}"


def test_a_stack_that_does_not_run_is_an_error():
    model, batch = make_m2m100(), make_batch()
    encoded = model.get_encoder()(**{key: batch[key] for key in ("input_ids", "attention_mask")})
    with pytest.raises(ValueError, match="no FFN block of the encoder ran"):
        ns.record_activations(model, {"en-de": [{**batch, "encoder_outputs": encoded}]}, progress=False)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ({}, "at least one language pair"),
        ({"en-de": []}, "en-de has no batch"),
        ({"english": [make_batch()]}, "Expected a language pair such as 'en-de'"),
        ({"en-de": [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]}, "needs labels or decoder_input_ids"),
    ],
)
def test_bad_input_is_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        ns.record_activations(make_m2m100(), batches, progress=False)
