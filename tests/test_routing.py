"""The right pair without being told: language tokens in the conventions of the models."""

import contextlib
import copy
import pickle

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import GenerationConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments

import neuron_specialization as ns
from neuron_specialization.adapter.routing import router_of

from .conftest import PAIRS, make_batch, make_m2m100, make_masks, make_t5

EN, DE, FR = 50, 51, 52
TOKENS = {"en": EN, "de": DE, "fr": FR}
CODES = {"en": EN, "de": DE, "fr": FR}
START, EOS = 2, 2


def adapted(pairs=PAIRS, make=make_m2m100, **config):
    model = make()
    masks = make_masks(model, pairs)
    if config.get("source_tag") == "target":
        masks.routes.source_tag = "target"
    settings = {"trainable": "delta", "init_weights": False, "language_token_ids": TOKENS, **config}
    return get_peft_model(
        model, ns.NeuronSpecializationConfig(masks=masks, task_type="SEQ_2_SEQ_LM", **settings)
    ).eval()


def words(batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(4, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


def column(values: list[int]) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def tagged(pairs: list[str], convention: str) -> dict[str, torch.Tensor]:
    """A training batch as the tokenizer and collator of each model make it."""
    source, target = ([CODES[code] for code in side] for side in zip(*(p.split("-") for p in pairs), strict=True))
    n = len(pairs)
    text, translation = words(n, 5, 0), words(n, 4, 1)
    eos, start = column([EOS] * n), column([START] * n)
    if convention in ("nllb", "m2m100", "mbart50"):
        inputs = torch.cat([column(source), text, eos], 1)
        labels = torch.cat([column(target), translation, eos], 1)
        decoder = torch.cat([start, labels[:, :-1]], 1)
    elif convention in ("nllb-legacy", "mbart25"):
        inputs = torch.cat([text, eos, column(source)], 1)
        labels = torch.cat([translation, eos, column(target)], 1)
        decoder = torch.cat([column(target), translation, eos], 1)
    else:  # marian, t5: the target's tag opens the source, and nothing marks the target
        inputs = torch.cat([column(target), text, eos], 1)
        labels = torch.cat([translation, eos], 1)
        decoder = torch.cat([start, translation], 1)
    return {"input_ids": inputs, "labels": labels, "decoder_input_ids": decoder}


@pytest.mark.usefixtures("each_batch_size")
@pytest.mark.parametrize("convention", ["nllb", "m2m100", "mbart50", "nllb-legacy", "mbart25"])
def test_forward_reads_the_pair_of_each_sample(convention):
    model, batch = adapted(), tagged(PAIRS, convention)
    expected = model(**batch, language_pairs=PAIRS).logits
    assert model(**batch).logits.equal(expected)
    labels_only = {k: v for k, v in batch.items() if k != "decoder_input_ids"}
    shifted = model(**labels_only, language_pairs=PAIRS).logits
    assert model(**labels_only).logits.equal(shifted), "labels carry the tag too"
    inputs_only = {k: v for k, v in batch.items() if k != "labels"}
    assert model(**inputs_only).logits.equal(expected), "and so do decoder inputs"
    one = {k: v[2:3] for k, v in batch.items()}
    assert model(**one).logits.equal(model(**one, language_pairs="en-fr").logits)


@pytest.mark.parametrize("make", [make_m2m100, make_t5], ids=["marian", "t5"])
def test_the_target_tag_on_the_source_is_enough_where_one_pair_fits(make):
    pairs = ["en-de", "en-fr", "de-en"]
    model, batch = adapted(pairs, make, source_tag="target"), tagged(pairs, "marian")
    assert model(**batch).logits.equal(model(**batch, language_pairs=pairs).logits)
    generated = {"input_ids": batch["input_ids"], "max_new_tokens": 5, "num_beams": 2}
    assert model.generate(**generated).equal(model.generate(**generated, language_pairs=pairs))
    ambiguous = adapted(PAIRS, make, source_tag="target")  # both de-en and fr-en go into English
    with pytest.raises(ValueError, match="Sample 1 of the batch is into en.*rows differ: de-en, fr-en"):
        ambiguous(**tagged(["en-de", "de-en"], "marian"))


def test_pairs_that_fit_may_agree():
    """With factorized masks every source into German shares the decoder row, and from English the encoder row."""
    model = make_m2m100()
    masks = make_masks(model, ["en-de", "en-fr"]).factorize()
    config = ns.NeuronSpecializationConfig(masks=masks, language_token_ids=TOKENS, task_type="SEQ_2_SEQ_LM")
    model = get_peft_model(model, config).eval()
    batch = tagged(["en-de"], "nllb")
    whole = model(**batch, language_pairs="en-de")
    assert model(**batch).logits.equal(whole.logits)
    encoder = model.get_base_model().get_encoder()  # alone it sees the source only, and both pairs fit
    assert encoder(batch["input_ids"]).last_hidden_state.equal(whole.encoder_last_hidden_state)


@pytest.mark.usefixtures("each_batch_size")
@pytest.mark.parametrize(
    "how",
    [
        {"forced_bos_token_id": DE},
        {"generation_config": GenerationConfig(forced_bos_token_id=DE, max_new_tokens=5)},
        {"decoder_start_token_id": DE},
        {"decoder_input_ids": torch.tensor([[START, DE]] * 2)},
    ],
    ids=["forced_bos", "generation_config", "decoder_start", "decoder_input_ids"],
)
def test_generate_reads_the_target_from_where_it_is_said(how):
    model = adapted()
    sources = tagged(["en-de", "en-de"], "nllb")["input_ids"]
    found = model.generate(input_ids=sources, num_beams=2, max_new_tokens=5, **how)
    expected = model.generate(input_ids=sources, num_beams=2, max_new_tokens=5, language_pairs="en-de", **how)
    other = model.generate(input_ids=sources, num_beams=2, max_new_tokens=5, language_pairs="en-fr", **how)
    assert found.equal(expected)
    assert found.shape != other.shape or not found.equal(other)


def test_generate_reads_what_is_passed_by_position():
    base = adapted().get_base_model()
    sources = tagged(["en-de", "en-de"], "nllb")["input_ids"]
    settings = GenerationConfig(forced_bos_token_id=DE, max_new_tokens=5, decoder_start_token_id=START)
    expected = base.generate(sources, generation_config=settings)
    assert expected[:, 1].eq(DE).all() and base.generate(sources, settings).equal(expected)
    assert base.generate(sources, settings, language_pairs="en-fr")[:, 1].eq(DE).all(), "the caller's token holds"


def test_the_models_generation_config_is_read_last():
    model = adapted()
    sources = tagged(["en-de"], "nllb")["input_ids"]
    model.get_base_model().generation_config.forced_bos_token_id = FR
    french = model.generate(input_ids=sources, max_new_tokens=5)
    assert french.equal(model.generate(input_ids=sources, max_new_tokens=5, language_pairs="en-fr"))
    german = model.generate(input_ids=sources, max_new_tokens=5, forced_bos_token_id=DE)
    assert german[0, 1] == DE


ITALIAN = 53


@pytest.mark.parametrize(
    "how",
    [
        {"forced_bos_token_id": ITALIAN},
        {"generation_config": GenerationConfig(forced_bos_token_id=ITALIAN, max_new_tokens=5)},
        {"decoder_input_ids": torch.tensor([[START, ITALIAN]] * 2)},
    ],
    ids=["forced_bos", "generation_config", "decoder_input_ids"],
)
def test_a_target_that_the_adapter_does_not_know_is_not_taken_for_another(how):
    """Only en-de starts from English here, and the model's own generation config says French."""
    sources = tagged(["en-de", "en-de"], "nllb")["input_ids"]
    model = adapted(["en-de", "de-en"])
    model.get_base_model().generation_config.forced_bos_token_id = FR
    with pytest.raises(ValueError, match="Sample 0 of the batch does not carry exactly one"):
        model.generate(input_ids=sources, max_new_tokens=5, **how)
    model = adapted(["en-de", "de-en"], default_pair="base")
    found = model.generate(input_ids=sources, max_new_tokens=5, **how)
    assert found.equal(model.generate(input_ids=sources, max_new_tokens=5, language_pairs="base", **how))


def test_a_forced_token_after_a_start_token_is_read():
    model = adapted()
    sources = tagged(["en-de", "en-de"], "nllb")["input_ids"]
    options = {"decoder_input_ids": torch.tensor([[START]] * 2), "forced_bos_token_id": DE, "max_new_tokens": 5}
    found = model.generate(input_ids=sources, **options)
    assert found[:, 1].eq(DE).all()
    options |= {"return_dict_in_generate": True, "output_logits": True}
    read, german, french = (
        torch.stack(model.generate(input_ids=sources, **options, **pairs).logits[:2])
        for pairs in ({}, {"language_pairs": "en-de"}, {"language_pairs": "en-fr"})
    )
    assert read.equal(german) and not read.equal(french)


def test_generate_sets_the_tag_where_the_sources_language_has_one_pair():
    """Else it would run the masks of that pair and generate whatever language the model falls into."""
    pairs = ["en-de", "de-en"]
    model, sources = adapted(pairs), tagged(pairs, "nllb")["input_ids"]
    found = model.generate(input_ids=sources, max_new_tokens=5)
    assert found.equal(model.generate(input_ids=sources, max_new_tokens=5, language_pairs=pairs))
    assert found[:, 1].tolist() == [DE, EN]
    model.generation_config.forced_bos_token_id = DE  # what is said of the target goes before
    assert model.generate(input_ids=sources[:1], max_new_tokens=5)[:, 1].tolist() == [DE]
    with pytest.raises(ValueError, match="Sample 0 of the batch is from en.*rows differ: en-de, en-fr"):
        adapted().generate(input_ids=sources[:1], max_new_tokens=5)


@pytest.mark.parametrize("how", ["passed", "selected", "with", "only", "id"])
def test_generate_sets_the_targets_tag_of_the_chosen_pair(how):
    """Else it would run the masks of one language and generate another."""
    model = adapted(["en-de"] if how == "only" else PAIRS)
    sources = tagged(["en-de", "en-de"], "nllb")["input_ids"]
    options = {"input_ids": sources, "max_new_tokens": 5, "num_beams": 2}
    expected = model.generate(**options, forced_bos_token_id=DE)
    if how == "selected":
        ns.set_language_pair(model, "en-de")
    passed = {"passed": {"language_pairs": "en-de"}, "id": {"language_pairs": torch.tensor([0, 0])}}.get(how, {})
    with ns.language_pair(model, "en-de") if how == "with" else contextlib.nullcontext():
        found = model.generate(**options, **passed)
    assert found[:, 1].eq(DE).all() and found.equal(expected)
    french = model.generate(**options, language_pairs="en-de", forced_bos_token_id=FR)
    assert french[:, 1].eq(FR).all(), "unless told otherwise"


def test_generate_reads_the_targets_from_labels_which_trainer_passes_along():
    model = adapted()
    batch = tagged(PAIRS, "nllb")
    options = {"input_ids": batch["input_ids"], "max_new_tokens": 5}
    expected = model.generate(**options, language_pairs=PAIRS)
    assert model.generate(**options, labels=batch["labels"]).equal(expected)
    only, untagged = adapted(["en-de"]), batch["labels"].clone()
    untagged[:, 0] = -100
    english = {"input_ids": batch["input_ids"][:1], "max_new_tokens": 5}
    assert only.generate(**english, labels=untagged[:1]).equal(only.generate(**english)), "they need not say it"
    first = {"input_ids": batch["input_ids"][:1], "labels": batch["labels"][:1]}
    assert model.generate(**first, forced_bos_token_id=FR)[0, 1] == FR, "what is said goes before"


@pytest.mark.parametrize("injected_by", ["peft", "transformers"])
def test_a_disabled_adapter_leaves_generate_alone(injected_by):
    """Neither its tag is set, nor a source refused that has another than the pair set on the model."""
    plain, options = make_m2m100(), {"input_ids": tagged(["fr-en"], "nllb")["input_ids"], "max_new_tokens": 5}
    expected = plain.generate(**options)
    if injected_by == "peft":
        model = adapted()
        off = model.disable_adapter
    else:
        model, off = make_m2m100(), contextlib.nullcontext
        model.add_adapter(ns.NeuronSpecializationConfig(masks=make_masks(model), language_token_ids=TOKENS))
        model.disable_adapters()
    ns.set_language_pair(model, "en-de")
    with off():
        assert model.generate(**options).equal(expected)


def test_labels_without_the_tag_leave_it_to_the_decoders_inputs():
    """A tag that is left out of the loss is still what the decoder starts with."""
    model, batch = adapted(default_pair="base"), tagged(PAIRS, "nllb")
    expected = model(**batch, language_pairs=PAIRS).logits
    batch["labels"][:2, 0] = -100
    assert model(**batch).logits.equal(expected)
    batch["decoder_input_ids"][2, 1] = EN
    expected = model(**batch, language_pairs=PAIRS).logits
    assert model(**batch).logits.equal(expected), "where labels have it, they decide"


def test_trainer_keeps_a_column_of_pairs(tmp_path):
    """It drops the columns that the model's signature does not have, and all samples would run the default pair."""
    model = adapted(language_token_ids=None, default_pair="en-de")
    expected = model(**make_batch(), language_pairs=PAIRS).loss.item()
    rows = [{**{k: v[i] for k, v in make_batch().items()}, "language_pairs": i} for i in range(len(PAIRS))]
    data = Dataset.from_list([{k: v.tolist() if hasattr(v, "tolist") else v for k, v in row.items()} for row in rows])
    args = Seq2SeqTrainingArguments(str(tmp_path), per_device_eval_batch_size=4, report_to=[], use_cpu=True)
    assert Seq2SeqTrainer(model, args, eval_dataset=data).evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_generate_sets_the_tags_that_the_active_adapter_knows():
    model = adapted(["en-de", "de-en"], language_token_ids={"en": EN, "de": DE})
    french = make_masks(make_m2m100(), ["en-fr", "fr-en"])
    options = {"init_weights": False, "task_type": "SEQ_2_SEQ_LM", "language_token_ids": {"en": EN, "fr": FR}}
    model.add_adapter("french", ns.NeuronSpecializationConfig(masks=french, **options))
    english = tagged(["en-de", "en-de"], "nllb")["input_ids"]
    assert model.generate(input_ids=english, max_new_tokens=3)[:, 1].tolist() == [DE, DE]
    model.set_adapter("french")
    model.eval()
    assert model.generate(input_ids=english, max_new_tokens=3)[:, 1].tolist() == [FR, FR]
    with ns.language_pair(model, "en-fr"):
        assert model.generate(input_ids=english, max_new_tokens=3)[:, 1].tolist() == [FR, FR]


def test_forward_reads_what_is_passed_by_position():
    model = make_m2m100()
    masks = make_masks(model, ["en-de", "de-en", "fr-en"])
    model.add_adapter(ns.NeuronSpecializationConfig(masks=masks, init_weights=False, language_token_ids=TOKENS))
    model.eval()
    batch = tagged(["fr-de"], "nllb")
    sides = batch["input_ids"], torch.ones_like(batch["input_ids"]), batch["decoder_input_ids"]
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    composed = model(**dict(zip(names, sides, strict=True))).logits
    assert model(*sides).logits.equal(composed)
    assert not model(*sides, language_pairs="fr-en").logits.equal(composed)


def test_generate_sets_the_tags_of_several_targets():
    model = adapted()
    sources = tagged(PAIRS, "nllb")["input_ids"]
    starts = torch.tensor([[START, CODES[pair.split("-")[1]]] for pair in PAIRS])
    expected = model.generate(input_ids=sources, decoder_input_ids=starts, max_new_tokens=5)
    assert model.generate(input_ids=sources, language_pairs=PAIRS, max_new_tokens=5).equal(expected)
    settings = GenerationConfig(decoder_start_token_id=0, max_new_tokens=5)
    for start in ({"decoder_start_token_id": 0, "max_new_tokens": 5}, {"generation_config": settings}):
        found = model.generate(input_ids=sources, language_pairs=PAIRS, **start)
        assert found[:, :2].equal(torch.stack([torch.zeros(4, dtype=torch.long), starts[:, 1]], 1))


@pytest.mark.parametrize("convention", ["nllb", "marian"])
def test_a_source_tag_that_contradicts_the_chosen_pair_is_an_error(convention):
    tag = {"nllb": "source", "marian": "target"}[convention]
    model = adapted(source_tag=tag)
    batch = tagged(["en-de", "fr-en"], convention)
    options = {"input_ids": batch["input_ids"], "max_new_tokens": 3}
    message = {"nllb": "Sample 1 .*'fr' .*'en-de'.*tag of 'en'", "marian": "Sample 1 .*'en' .*'en-de'.*tag of 'de'"}
    with pytest.raises(ValueError, match=message[convention]):
        model.generate(**options, language_pairs="en-de")
    model.generate(**options, language_pairs=["en-de", "fr-en"])


def test_a_batch_of_several_targets_generates_from_decoder_inputs():
    model = adapted()
    sources = tagged(PAIRS, "nllb")["input_ids"]
    starts = torch.tensor([[START, CODES[pair.split("-")[1]]] for pair in PAIRS])
    options = {"num_beams": 3, "max_new_tokens": 5}
    mixed = model.generate(input_ids=sources, decoder_input_ids=starts, **options)
    for i, pair in enumerate(PAIRS):
        alone = model.generate(
            input_ids=sources[i : i + 1], decoder_input_ids=starts[i : i + 1], language_pairs=pair, **options
        )[0]
        width = min(len(alone), mixed.shape[1])
        assert mixed[i, :width].equal(alone[:width])


def test_encoder_rows_are_right_from_the_first_encoder_call():
    """They depend on the target here, which only `forced_bos_token_id` tells."""
    model = adapted()
    sources = tagged(["en-de"], "nllb")["input_ids"]
    seen = []
    encoder = model.get_base_model().get_encoder()
    encoder.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    for target in (DE, FR):
        model.generate(input_ids=sources, forced_bos_token_id=target, max_new_tokens=2)
    model(**tagged(["en-fr"], "nllb"))
    assert not torch.allclose(seen[0], seen[1]) and torch.allclose(seen[1], seen[2], atol=1e-6)


def test_wrong_tags_name_the_sample():
    model, batch = adapted(), tagged(PAIRS, "nllb")
    untagged = copy.deepcopy(batch)
    untagged["input_ids"][2, 0] = 7
    with pytest.raises(ValueError, match="Sample 2 of the batch does not carry exactly one.*en 50, de 51, fr 52"):
        model(**untagged)
    double = copy.deepcopy(batch)
    double["input_ids"][1, 3] = FR
    with pytest.raises(ValueError, match="Sample 1 of the batch does not carry exactly one"):
        model(**double)
    same_twice = copy.deepcopy(batch)
    same_twice["input_ids"][0, 3] = EN  # the same tag again says nothing new
    model(**same_twice)
    with pytest.raises(ValueError, match="Sample 1 of the batch: There is no language pair 'de-de'"):
        model(input_ids=batch["input_ids"], decoder_input_ids=torch.full((4, 3), DE))


@pytest.mark.parametrize("default", ["base", "en-fr"])
def test_samples_without_a_route_fall_back_to_the_default_pair(default):
    model, batch = adapted(default_pair=default), tagged(PAIRS, "nllb")
    batch["input_ids"][2, 0] = 7
    assert model(**batch).logits.equal(model(**batch, language_pairs=["en-de", "de-en", default, "fr-en"]).logits)


def test_what_is_said_goes_before_what_is_read():
    model, batch = adapted(), tagged(["en-de"], "nllb")
    french = model(**batch, language_pairs="en-fr").logits
    with ns.language_pair(model, "en-fr"):
        assert model(**batch).logits.equal(french)
    assert not model(**batch).logits.equal(french)


def test_zero_shot_directions_are_read_and_composed():
    model, batch = adapted(), tagged(["de-fr", "fr-de"], "nllb")
    assert model(**batch).logits.equal(model(**batch, language_pairs=["de-fr", "fr-de"]).logits)
    refused = adapted(["de-en", "en-fr"], source_tag="target")
    with pytest.raises(ValueError, match="cannot be composed.*Marian"):
        refused(**batch, language_pairs="de-fr")


def test_tokens_are_read_beside_adapter_names():
    """Samples of another adapter, which this one could not route, do not matter to it."""
    model = adapted(["en-de"])
    other = ns.NeuronSpecializationConfig(
        masks=make_masks(make_m2m100(), ["en-fr"]),
        init_weights=False,
        language_token_ids=TOKENS,
        task_type="SEQ_2_SEQ_LM",
    )
    model.add_adapter("french", other)
    model.eval()
    batch = tagged(["en-de", "en-fr", "fr-de"], "nllb")
    mixed = model(**batch, adapter_names=["default", "french", "__base__"]).logits
    german = model(**{k: v[:1] for k, v in batch.items()}).logits
    model.set_adapter("french")
    french = model(**{k: v[1:2] for k, v in batch.items()}).logits
    torch.testing.assert_close(mixed[:1], german, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1:2], french, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trainable", ["none", "delta", "low_rank", "full"])
def test_adapters_that_transformers_injects_work_alike(trainable, tmp_path):
    base = make_m2m100()
    config = {"masks": make_masks(base), "trainable": trainable, "language_token_ids": TOKENS, "init_weights": False}
    batch = tagged(PAIRS, "nllb")
    added = make_m2m100()
    added.add_adapter(ns.NeuronSpecializationConfig(**config))
    if trainable != "none":
        parameters = [p for p in added.parameters() if p.requires_grad]
        added(**batch).loss.backward()
        torch.optim.SGD(parameters, lr=0.5).step()
    added.eval()
    expected = added(**batch).logits
    assert expected.equal(added(**batch, language_pairs=PAIRS).logits)
    added.save_pretrained(tmp_path)
    loaded = make_m2m100()
    loaded.load_adapter(str(tmp_path))
    loaded.eval()
    torch.testing.assert_close(loaded(**batch).logits, expected)
    options = {"max_new_tokens": 5, "forced_bos_token_id": DE}
    english = tagged(["en-de"], "nllb")["input_ids"]
    assert loaded.generate(english, **options).equal(added.generate(english, **options))
    ns.set_language_pair(loaded, "fr-en")
    assert not loaded(**batch).logits.equal(expected)
    if trainable != "full":
        loaded.disable_adapters()
        torch.testing.assert_close(loaded(**batch).logits, make_m2m100()(**batch).logits)


def compile_and_count(model):
    """The model compiled, and the list that grows with each graph that is compiled."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=count), graphs


def one_layer():
    return make_m2m100(layers=1)


def test_compiled_models_switch_pairs_without_compiling_again():
    model, batch = adapted(make=one_layer), tagged(["en-de"], "nllb")
    compiled, graphs = compile_and_count(model)
    with torch.no_grad():
        first = compiled(**batch, language_pairs="en-de").logits
        made = len(graphs)
        assert made > 0
        for pair in ("de-en", "en-fr", "fr-en", "de-fr"):
            found = compiled(**batch, language_pairs=pair).logits
            torch.testing.assert_close(found, model(**batch, language_pairs=pair).logits)
            assert not torch.allclose(found, first)
        for ids in (0, 1, 2):
            compiled(**batch, language_pairs=torch.tensor([ids]))
        compiled(**batch)
        assert len(graphs) == made, f"{len(graphs) - made} compilations too many"
    torch._dynamo.reset()


def test_compiled_training_on_mixed_batches_does_not_compile_again():
    """Nor where samples come and go that run the untouched base."""
    model = adapted(make=one_layer, default_pair="base", language_token_ids=None).train()
    compiled, graphs = compile_and_count(model)
    ids = [[0, 1, 2, 3], [3, 3, 1, 0], [-1, 0, 1, -1]]
    made = None
    for batch_ids in ids:
        compiled(**make_batch(), language_pairs=torch.tensor(batch_ids)).loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model(**make_batch(), language_pairs=torch.tensor(batch_ids)).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)
        model.zero_grad()
        made = made or len(graphs)
    assert len(graphs) == made, f"{len(graphs) - made} compilations too many"
    torch._dynamo.reset()


@pytest.mark.parametrize("injected_by", ["peft", "transformers"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_read_tokens_by_themselves(injected_by, copied):
    batch = tagged(PAIRS, "nllb")
    original = adapted() if injected_by == "peft" else make_m2m100()
    if injected_by == "transformers":
        masks = make_masks(original)
        original.add_adapter(
            ns.NeuronSpecializationConfig(masks=masks, language_token_ids=TOKENS, init_weights=False), "masks"
        )
    other = copied(original.eval())
    expected = original(**batch).logits
    ns.set_language_pair(original, "en-de")
    assert other(**batch).logits.equal(expected), "it does not share the choice of the pair"
    sources = tagged(["en-fr"], "nllb")["input_ids"]
    options = {"input_ids": sources, "forced_bos_token_id": FR, "max_new_tokens": 5}
    ns.set_language_pair(original, None)
    assert other.generate(**options).equal(original.generate(**options))


@pytest.mark.parametrize("default", [None, "base", "en-fr"])
def test_ids_and_names_of_pairs_agree(default):
    """Training says ids, translating says names."""
    resolver = router_of(adapted(default_pair=default)).resolvers["default"]
    for pair in PAIRS:
        assert tuple(resolver.rows[resolver.pair_id(pair)].tolist()) == resolver.route(pair)
    assert resolver.route("de-fr") == (resolver.route("de-en")[0], resolver.route("en-fr")[1])
    with pytest.raises(ValueError, match="'de-fr' is composed.*pass its name"):
        resolver.pair_id("de-fr")
    if default is None:
        with pytest.raises(ValueError, match="no language pair 'it-en'"):
            resolver.pair_id("it-en")
    else:
        unknown = resolver.pair_id("it-en")
        assert unknown == (-1 if default == "base" else PAIRS.index(default))
    composed = router_of(adapted(default_pair="de-fr")).resolvers["default"]
    with pytest.raises(ValueError, match="'de-fr' is composed.*pass its name"):
        composed.pair_id("it-en")


@pytest.mark.parametrize("ids", [[0, 1, 2, 3], 2, torch.tensor(2), torch.tensor([[0], [1], [2], [3]])], ids=str)
def test_pairs_are_given_by_ids_in_any_form(ids):
    model = adapted()
    names = PAIRS if isinstance(ids, list) or getattr(ids, "ndim", 0) else PAIRS[2]
    assert model(**make_batch(), language_pairs=ids).logits.equal(model(**make_batch(), language_pairs=names).logits)
    for wrong in (torch.float32, torch.bool):
        with pytest.raises(ValueError, match=f"names or integer ids, got {wrong}"):
            model(**make_batch(), language_pairs=torch.zeros(4, dtype=wrong))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_pairs_may_be_small_integers(dtype):
    model, ids = adapted(), torch.tensor([0, 1, 0, 1])
    expected = model(**make_batch(), language_pairs=ids).logits
    assert model(**make_batch(), language_pairs=ids.to(dtype)).logits.equal(expected)


@pytest.mark.parametrize("pair", [0, None, ["en-de"]], ids=str)
def test_what_is_no_name_of_a_pair_is_said_so(pair):
    model = adapted()
    with pytest.raises(ValueError, match="Expected a language pair such as 'en-de'"), ns.language_pair(model, pair):
        pass
    with pytest.raises(ValueError, match="Expected a language pair such as 'en-de'"):
        model(**make_batch(), language_pairs=["en-de", pair, "en-de", "en-de"])


def test_a_pair_set_on_the_model_goes_with_the_last_adapter_that_has_it():
    model = adapted()
    model.add_adapter("b", ns.NeuronSpecializationConfig(masks=make_masks(make_m2m100(), ("fr-en", "en-fr"))))
    ns.set_language_pair(model, "en-fr")
    model.delete_adapter("default")
    assert router_of(model).selected == "en-fr"
    model.add_adapter("c", ns.NeuronSpecializationConfig(masks=make_masks(make_m2m100(), ("de-en",))))
    model.delete_adapter("b")
    model.set_adapter("c")
    expected = model(**make_batch(), language_pairs="de-en").logits
    assert model(**make_batch()).logits.equal(expected), "its only pair"


@pytest.mark.parametrize("ids", [[-1, 0, 0, 0], [0, 1, 2, 99]])
def test_pair_ids_that_are_none_are_refused(ids):
    model = make_m2m100()
    config = ns.NeuronSpecializationConfig(masks=make_masks(model), task_type="SEQ_2_SEQ_LM")
    with pytest.raises(ValueError, match="Expected pair ids from 0 to"):
        get_peft_model(model, config)(**make_batch(), language_pairs=torch.tensor(ids))


def test_generate_refuses_a_batch_of_which_it_can_tag_some_samples_only():
    """Those of the adapter's pairs would begin with any language."""
    model = adapted(default_pair="base")
    sources = tagged(["en-de"] * 3, "nllb")["input_ids"]
    options = {"input_ids": sources, "language_pairs": ["en-de", "base", "en-fr"], "max_new_tokens": 3}
    with pytest.raises(
        ValueError, match=r"of some samples of the batch, but none for \['base'\]. Pass decoder_input_ids"
    ):
        model.generate(**options)
    starts = torch.tensor([[START, token] for token in (DE, FR, FR)])
    assert model.generate(**options, decoder_input_ids=starts)[:, :2].equal(starts)
