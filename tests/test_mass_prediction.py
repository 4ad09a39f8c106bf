"""What mass says about attribution and later scores, and the batches that it is recorded on."""

import math

import pytest
import torch
from datasets import Dataset

import neuron_specialization as ns
from neuron_specialization.analysis.mass_prediction import (
    early_and_later,
    growth_and_change,
    growth_table,
    mass_against_attribution,
    mass_features,
    predictors,
)
from neuron_specialization.analysis.mass_recording import record_mass
from neuron_specialization.analysis.mass_report import change_table
from neuron_specialization.translation.attention import cross_attention, example_sentence
from neuron_specialization.translation.recording import corpus_batches, vocabulary_digest
from neuron_specialization.translation.tagged_text import load_tagged_text
from neuron_specialization.translation.tokenization import train_tokenizer

from .conftest import make_batch, make_m2m100


def test_neurons_with_more_mass_have_more_attribution():
    model = make_m2m100(activation_function="gelu")
    batches = {"en-de": [make_batch(seed=0)], "en-fr": [make_batch(seed=1)]}
    mass = record_mass(model, batches, progress=False)
    attribution = ns.record_attribution(model, batches, progress=False)
    rows = mass_against_attribution(mass, attribution)
    assert len(rows) == 2 * 4 and all(-1 <= row["mass"] <= 1 for row in rows)
    assert sum(row["mass"] for row in rows) / len(rows) > 0.2
    with pytest.raises(ValueError, match="different models"):
        other = make_m2m100(activation_function="gelu", decoder_ffn_dim=30)
        mass_against_attribution(record_mass(other, batches, progress=False), attribution)
    with pytest.raises(ValueError, match="other text"):
        mass_against_attribution(mass, ns.record_attribution(model, {"en-de": batches["en-de"]}, progress=False))
    with pytest.raises(ValueError, match="site 'pre_activation'"):
        mass_against_attribution(record_mass(model, batches, "pre_activation", progress=False), attribution)


def test_features_are_means_over_layers():
    model = make_m2m100()
    mass = record_mass(model, {"a": [make_batch()]}, "pre_activation", token_ids=range(60), progress=False)
    found = mass_features(mass, "a")
    layers = list(mass.credit)
    positions = {stack: int(count[0]) for stack, count in mass.positions.items()}
    by_hand = [mass.positive[layer][0].mean() / positions[mass.stacks[layer]] for layer in layers]
    assert found["positive"] == pytest.approx(float(sum(by_hand)) / len(layers))
    assert 0 < found["balance"] < 1 and 0 < found["alive"] <= 1
    assert found["length"] >= 1
    assert "length" not in mass_features(record_mass(model, {"a": [make_batch()]}, progress=False), "a")


def row(order, direction, bleu, positive=0.0, negative=0.0):
    method = "sequential" if order else "pretraining"
    about = {"method": method, "order": order, "seed": 0, "direction": direction}
    return {**about, "bleu": bleu, "positive": positive, "negative": negative}


ROWS = [
    *(row("", "en-de", 0, 1, 1), row("", "en-fr", 0, 1, 1)),
    *(row("en-de", "en-de", 20, 3, 1), row("en-de", "en-fr", 1, 1, 2)),
    *(row("en-de/en-fr", "en-de", 5, 2, 3), row("en-de/en-fr", "en-fr", 25, 4, 2)),
]


def test_early_models_are_set_against_the_last_and_each_step_against_the_one_before():
    early = early_and_later(ROWS, ["en-de/en-fr", "en-fr/en-de"])
    assert [(r["order"], r["direction"], r["positive"], r["later"]) for r in early] == [
        *(("en-de/en-fr", "en-de", 2, 5), ("en-de/en-fr", "en-fr", 1, 25))
    ], "each outcome once, the models before it averaged"
    steps = growth_and_change(ROWS, ["en-de/en-fr"])
    assert [(r["growth"], r["change"], r["trained"]) for r in steps] == [
        *((2, 20, True), (-1, 1, False), (-3, -15, False), (3, 24, True))
    ]
    (found,) = predictors(steps, "change", ["growth"])
    assert found["rho"] == pytest.approx(1) and (found["n"], found["outcomes"]) == (4, 4)
    missing, constant = predictors(early, "later", ["length", "negative"])
    assert missing["n"] == 0 and math.isnan(missing["rho"]) and constant["n"] == 2


def test_growth_that_shifts_from_step_to_step_is_compared_within_steps():
    steps = [
        {"order": "/".join("abc"[: step + 1]), "seed": 0, "growth": 10 * step + pair, "change": 5 * pair - 4 * step}
        for step in range(3)
        for pair in range(3)
    ]
    pooled, within = growth_table(steps)
    assert (pooled["compared"], within["compared"]) == ("pooled", "within steps")
    assert pooled["rho"] < 0.1 and within["rho"] == pytest.approx(1), "in each step, what grows more gains more"
    assert within["p"] == pytest.approx(2 / 6**3, abs=0.003), "all steps so, or all reversed, of 6 orders each"
    assert pooled["p"] > 0.3
    six = [{"a": i, "later": i % 2} for i in range(6)]
    (found,) = predictors(six, "later", ["a"])
    assert (found["n"], found["outcomes"]) == (6, 2) and found["p"] == pytest.approx(0.7, abs=0.02)


def test_recordings_of_different_tokenizers_are_not_compared(toy_tokenizer, toy):
    text = toy.sentences(50, "train")
    other = train_tokenizer((s for code in toy.languages for s in text[code]), toy.languages, 400, 64)
    assert vocabulary_digest(other) != vocabulary_digest(toy_tokenizer) == vocabulary_digest(toy_tokenizer)
    model, batches = make_m2m100(), {"a": [make_batch()]}
    masses = {
        str(i): record_mass(model, batches, token_ids=[5], vocabulary=vocabulary_digest(tokenizer), progress=False)
        for i, tokenizer in enumerate((toy_tokenizer, other))
    }
    with pytest.raises(ValueError, match="differ in vocabulary"):
        change_table(masses, "a")
    same = change_table({"before": masses["0"], "after": masses["0"]}, "a")
    assert len(same) == 4 and all(line["positive"] == 0 and line["only_before"] == 0 for line in same)


def test_tags_of_words_reach_their_tokens(toy_model, toy_tokenizer, tmp_path):
    words = [["baku", "tita", "!"], ["du", "x"]]
    tags = [["NOUN", "VERB", "PUNCT"], ["DET", "NOUN"]]
    rows = {"text": ["baku tita!", "du x"], "tokens": words, "upos": tags}
    Dataset.from_dict(rows).to_parquet(tmp_path / "tagged.parquet")
    text, names = load_tagged_text(str(tmp_path / "tagged.parquet"), "Pv-Aa")
    assert names == ["DET", "NOUN", "PUNCT", "VERB"]
    (batch,) = corpus_batches(toy_model, toy_tokenizer, text, tags=names)["Pv-Aa"]
    for ids, found in zip(batch["input_ids"], batch["token_tags"], strict=True):
        named = {}
        for token, tag in zip(toy_tokenizer.convert_ids_to_tokens(ids.tolist()), found.tolist(), strict=True):
            if tag >= 0:
                named.setdefault(names[tag], []).append(token)
        joined = {tag: "".join(tokens).replace("▁", "").replace("<unk>", "?") for tag, tokens in named.items()}
        assert joined.keys() in ({"NOUN", "VERB", "PUNCT"}, {"DET", "NOUN"})
        assert joined["NOUN"] in ("baku", "x", "?")
        assert found[0] == found[-1] == -100, "tags and the end of sentence are no words"
    mass = record_mass(toy_model, {"Pv-Aa": [batch]}, stack="encoder", tags=names, progress=False)
    (layer,) = mass.tag_credit
    assert torch.isfinite(mass.tag_credit[layer]).all() and mass.tag_credit[layer].sum() > 0
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "plain.parquet")
    with pytest.raises(ValueError, match="lacks tokens, upos"):
        load_tagged_text(str(tmp_path / "plain.parquet"), "Pv-Aa")


def test_the_example_is_a_short_sentence_or_the_nearest_to_one():
    lengths = lambda *counts: Dataset.from_dict(  # noqa: E731
        {side: [" ".join([side] * count) for count in counts] for side in ("source", "target")}
    )
    assert example_sentence(lengths(3, 9, 8, 5)) == ("source " * 7 + "source", "target " * 7 + "target")
    assert example_sentence(lengths(2, 12, 10))[0].count("source") == 10


def test_cross_attention_is_that_of_the_sentence_pair(toy_model, toy_tokenizer, toy_data):
    (sentence,) = toy_data["test"]["Pv-Aa"].select([0])
    before = toy_model.config._attn_implementation
    found = cross_attention(toy_model, toy_tokenizer, sentence["source"], sentence["target"], "Pv-Aa")
    weights, source, target = found
    assert weights.shape == (len(target), len(source)) and weights.sum(1) == pytest.approx(1)
    assert source[0] == "Pv" and target[0] == "Aa" and source[-1] == target[-1] == "</s>"
    assert toy_model.config._attn_implementation == before
