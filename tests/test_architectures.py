"""One contract for every encoder-decoder architecture: find, record, select, inject, train, save, reload, generate."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

import neuron_specialization as ns

from .architectures import ARCHITECTURES, TABLE_BEGINS, TABLE_ENDS, double, make, make_batch, support_table
from .test_recipes import ROOT

pytestmark = pytest.mark.usefixtures("small_batches_run_compact")

NAMES = list(ARCHITECTURES)
PAIRS = ["en-de", "de-en", "en-fr", "fr-en"]
BY_EXPERTS = [name for name in NAMES if ARCHITECTURES[name].experts]
BY_LAYER = [name for name in NAMES if name not in BY_EXPERTS]


def masks_of(name: str, model) -> ns.NeuronMasks:
    batches = {pair: [make_batch(name, 2, seed=i)] for i, pair in enumerate(PAIRS)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an expert may see no token of so few
        return ns.CumulativeThreshold(0.6).select(ns.record_activations(model, batches, progress=False))


def adapted_of(name: str, **config):
    model = make(name)
    masks = masks_of(name, model)
    config = ns.NeuronSpecializationConfig(masks=masks, task_type="SEQ_2_SEQ_LM", **config)
    return get_peft_model(model, config).eval()


def forward(name: str, model, **kwargs):
    """Run a PeftModel; PEFT's seq2seq wrapper names `input_ids`, which speech models do not have."""
    target = model.get_base_model() if ARCHITECTURES[name].features else model
    return target(**make_batch(name), **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_found_are_those_the_model_has(name):
    """No more, no fewer: and every one of them runs."""
    model = make(name)
    blocks = ns.find_ffn_blocks(model)
    assert len(blocks) == ARCHITECTURES[name].blocks
    assert {block.stack for block in blocks} == {"encoder", "decoder"}
    ran = set()
    for block in blocks:
        block.down.register_forward_hook(lambda module, args, output, name=block.name: ran.add(name))
    with torch.no_grad():
        model(**make_batch(name))
    assert ran == {block.name for block in blocks}


@pytest.mark.parametrize("name", NAMES)
def test_counts_leave_padding_out_and_the_head_alone(name):
    model, batch = double(name, make(name), make_batch(name))
    counts = ns.record_activations(model, {"en-de": [batch]}, progress=False)
    assert counts.tokens["decoder"].item() == (batch["labels"] != -100).sum()
    if "attention_mask" in batch:
        assert counts.tokens["encoder"].item() == batch["attention_mask"].sum()
    for name_of_block, count in counts.counts.items():
        assert 0 <= count.min() and count.max() <= counts.tokens[counts.stacks[name_of_block]]
    one_by_one = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    single = ns.record_activations(model, {"en-de": one_by_one}, progress=False)
    for name_of_block, count in counts.counts.items():
        assert single.counts[name_of_block].equal(count), name_of_block
    if "attention_mask" in batch:
        longer = {"input_ids": 1, "attention_mask": 0, "decoder_input_ids": 1, "labels": -100}
        padded = {k: torch.nn.functional.pad(v, (0, 4), value=longer[k]) for k, v in batch.items()}
        again = ns.record_activations(model, {"en-de": [padded]}, progress=False)
        for name_of_block, count in counts.counts.items():
            assert again.counts[name_of_block].equal(count), name_of_block


@pytest.mark.parametrize("execution", ["masked", "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_masked_equals_zeroed_rows(name, execution):
    model, batch = double(name, make(name), make_batch(name))
    masks = masks_of(name, make(name))
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for block in masks.rows:
            reference.get_submodule(block).weight[~masks.row("en-fr", block)] = 0
    config = ns.NeuronSpecializationConfig(
        masks=masks, trainable="none", execution=execution, task_type="SEQ_2_SEQ_LM"
    )
    adapted = get_peft_model(model, config).eval()
    with torch.no_grad():
        expected = reference(**batch).logits
        found = adapted.get_base_model()(**batch, language_pairs="en-fr").logits
        other = adapted.get_base_model()(**batch, language_pairs="de-en").logits
    exact = 1e-9 if expected.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, expected, rtol=exact, atol=exact)
    assert not torch.allclose(other, expected)


@pytest.mark.parametrize("name", BY_LAYER)
def test_a_mixed_batch_equals_runs_of_one_pair(name):
    adapted = adapted_of(name, init_weights=False)
    with torch.no_grad():
        mixed = forward(name, adapted, language_pairs=PAIRS).logits
        for i, pair in enumerate(PAIRS):
            alone = forward(name, adapted, language_pairs=pair).logits
            torch.testing.assert_close(mixed[i], alone[i], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(mixed[0], forward(name, adapted, language_pairs="fr-en").logits[0], atol=1e-4)


@pytest.mark.parametrize("name", BY_EXPERTS)
def test_experts_refuse_several_pairs_in_one_batch(name):
    adapted = adapted_of(name)
    with pytest.raises(ValueError, match="Several language pairs .*samples cannot be told apart.*Run one per batch"):
        forward(name, adapted, language_pairs=PAIRS)


@pytest.mark.parametrize("name", BY_EXPERTS)
def test_experts_refuse_several_adapters_in_one_batch(name):
    adapted = adapted_of(name)
    config = ns.NeuronSpecializationConfig(masks=masks_of(name, make(name)), task_type="SEQ_2_SEQ_LM")
    adapted.add_adapter("second", config)
    adapted.set_language_pair("en-de")
    with pytest.raises(ValueError, match="Several adapters in one batch.*Run one per batch"):
        adapted(**make_batch(name), adapter_names=["default", "second"] * 2)
    found = adapted(**make_batch(name), adapter_names=["second"] * 4).logits
    adapted.set_adapter("second")
    torch.testing.assert_close(found, adapted(**make_batch(name)).logits)


@pytest.mark.parametrize("name", BY_LAYER)
def test_mixed_batches_generate_like_runs_of_one_pair(name):
    adapted = adapted_of(name, init_weights=False)
    model, batch = adapted.get_base_model(), make_batch(name)
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "decoder_input_ids")}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "use_cache": ARCHITECTURES[name].use_cache}
    mixed = model.generate(**inputs, **options, language_pairs=PAIRS)
    for i, pair in enumerate(PAIRS):
        assert mixed[i].equal(model.generate(**inputs, **options, language_pairs=pair)[i]), pair


@pytest.mark.parametrize("name", NAMES)
def test_exported_models_compute_the_same(name):
    adapted = adapted_of(name, init_weights=False)
    with torch.no_grad():
        expected = forward(name, adapted, language_pairs="en-fr").logits
        found = ns.compact(adapted, "en-fr")(**make_batch(name)).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_train_save_reload_generate(name, tmp_path):
    adapted = adapted_of(name, trainable="delta").train()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    loss = forward(name, adapted, language_pairs="en-de").loss
    loss.backward()
    optimizer.step()
    trained = forward(name, adapted.eval(), language_pairs="en-de")
    assert trained.loss < loss
    adapted.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(make(name), str(tmp_path)).eval()
    torch.testing.assert_close(forward(name, loaded, language_pairs="en-de").logits, trained.logits)
    inputs = {k: v for k, v in make_batch(name).items() if k != "labels"}
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "language_pairs": "en-de"}
    options["use_cache"] = ARCHITECTURES[name].use_cache
    assert (
        loaded.get_base_model()
        .generate(**inputs, **options)
        .equal(adapted.get_base_model().generate(**inputs, **options))
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_an_architecture_freezes_stays_frozen(name):
    """Sinusoidal positions get no gradient, which DistributedDataParallel would wait for."""
    trained = {n for n, parameter in make(name).named_parameters() if parameter.requires_grad}
    full = adapted_of(name, trainable="full").get_base_model()
    assert {n.replace(".base_layer", "") for n, p in full.named_parameters() if p.requires_grad} == trained
    compact = ns.compact(adapted_of(name), "en-fr")
    assert {n for n, parameter in compact.named_parameters() if parameter.requires_grad} == trained


def test_an_expert_without_tokens_stays_dense_with_a_warning():
    model = make("switch_transformers")
    router = model.encoder.block[1].layer[1].mlp.router
    with torch.no_grad():  # every token to the first expert
        router.classifier.weight.zero_()
    counts = ns.record_activations(model, {"en-de": [make_batch("switch_transformers")]}, progress=False)
    unused = "encoder.block.1.layer.1.mlp.experts.expert_1.wi"
    assert counts.counts[unused].sum() == 0
    with pytest.warns(UserWarning, match="expert_1.wi.*stay dense"):
        masks = ns.CumulativeThreshold(0.6).select(counts)
    assert masks.row("en-de", unused).all()


def test_time_major_models_are_recognized_even_where_shapes_cannot_tell():
    """As many sentences as tokens: [length, batch] and [batch, length] look the same."""
    adapted = adapted_of("fsmt", init_weights=False)
    batch = {k: v[:4, :4].contiguous() for k, v in make_batch("fsmt").items()}
    mixed = adapted(**batch, language_pairs=PAIRS).logits
    for i, pair in enumerate(PAIRS):
        torch.testing.assert_close(mixed[i], adapted(**batch, language_pairs=pair).logits[i], rtol=1e-3, atol=1e-4)


def test_every_encoder_decoder_type_of_transformers_is_here():
    """The others of that mapping are decoders that hear."""
    for name in set(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES) - set(ARCHITECTURES):
        assert not CONFIG_MAPPING[name]().is_encoder_decoder, name


def test_the_readmes_support_table_is_the_one_these_tests_make():
    readme = (ROOT / "README.md").read_text()
    shown = readme.partition(TABLE_BEGINS)[2].partition(TABLE_ENDS)[0].strip()
    assert shown == support_table(), "run python -m tests.architectures"
