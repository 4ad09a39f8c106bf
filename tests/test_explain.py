"""Why masks do what they do: gradients of pairs against autograd by hand, activity by tag, tagged text."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from peft import get_peft_model

import neuron_specialization as ns
from neuron_specialization.analysis import mask_plots
from neuron_specialization.analysis.gradients import gradient_cosines, gradient_rows, pair_gradients, relation
from neuron_specialization.analysis.tagged_activity import TaggedCounts, mean_rows, record_tagged, tag_rows
from neuron_specialization.neurons.language_pairs import Routes
from neuron_specialization.neurons.masks import NeuronMasks
from neuron_specialization.translation.tagged_text import TaggedSentence, by_length, load_tagged, tagged_batches
from neuron_specialization.translation.token_loss import scored_batches

from .conftest import PAIRS, make_batch, make_m2m100, make_masks, make_t5, zero_masked_rows


def batches(pairs=tuple(PAIRS), **options):
    return {pair: [make_batch(seed=10 * i + j, **options) for j in range(2)] for i, pair in enumerate(pairs)}


@pytest.mark.parametrize("make", [make_m2m100, make_t5], ids=["relu", "gated"])
def test_gradients_are_those_of_the_mean_loss_over_tokens(make):
    model, given = make().train(), batches(["en-de", "de-en"])
    frozen = [name for name, parameter in model.named_parameters() if "norm" in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    found = {scope: pair_gradients(model, given, scope) for scope in ("up", "block")}
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad and "position" not in n] == frozen
    model.eval()
    for i, group in enumerate(given.values()):
        model.zero_grad()
        nats = sum(model(**batch).loss * (batch["labels"] != -100).sum() for batch in group)
        (nats / sum((batch["labels"] != -100).sum() for batch in group)).backward()
        for block in ns.find_ffn_blocks(model):
            parts = [part for part in (block.up, block.gate, block.down) if part is not None]
            whole = torch.cat([p.grad.flatten() for part in parts for p in (part.weight, part.bias) if p is not None])
            torch.testing.assert_close(found["block"][block.name][i], whole)
            masked = model.get_submodule(block.name).weight.grad.flatten()
            torch.testing.assert_close(found["up"][block.name][i], masked)
    with pytest.raises(ValueError, match="scope must be one of up, block"):
        pair_gradients(model, given, "layer")


def test_gradients_under_masks_are_those_of_the_masked_model():
    model = make_m2m100()
    masks = make_masks(model)
    config = ns.NeuronSpecializationConfig(masks=masks, trainable="none", task_type="SEQ_2_SEQ_LM")
    adapted = get_peft_model(copy.deepcopy(model), config)
    given = batches()
    routed = {pair: [{**batch, "language_pairs": [pair]} for batch in group] for pair, group in given.items()}
    found = pair_gradients(adapted, routed)
    for i, pair in enumerate(PAIRS):
        reference = pair_gradients(zero_masked_rows(model, masks, pair), {pair: given[pair]})
        for name, rows in found.items():
            kept = masks.row(pair, name)
            gradient = rows[i].view(len(kept), -1)
            assert not gradient[~kept].any() and gradient[kept].any()
            expected = reference[name][0].view(len(kept), -1)
            torch.testing.assert_close(gradient[kept], expected[kept], rtol=1e-4, atol=1e-6)


def test_cosines_compare_halves_and_tell_conflict_from_noise():
    """Pairs that learn opposite labels from one text pull in opposite directions; a pair agrees with itself."""
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 50, generator=draw)
    first = {"a": torch.stack([weights[0], -weights[0], weights[1]])}
    second = {"a": first["a"] * torch.tensor([[2.0], [1.0], [3.0]])}
    cosines = gradient_cosines(first, second)["a"]
    assert np.allclose(cosines, cosines.T) and np.allclose(cosines.diagonal(), 1) and np.isclose(cosines[0, 1], -1)
    noisy = {"a": second["a"] + 5 * torch.randn(3, 50, generator=draw)}
    assert (gradient_cosines(first, noisy)["a"].diagonal() < 0.9).all()


def test_rows_tell_relations_of_directions_apart():
    expected = {
        "en-fr": "same source",
        "de-en": "reverse",
        "fr-de": "same target",
        "de-fr": "other",
        "en-de": "itself",
    }
    assert {other: relation("en-de", other) for other in expected} == expected
    model = make_m2m100()
    halves = [pair_gradients(model, batches(target=target)) for target in (7, 6)]
    rows = gradient_rows(gradient_cosines(*halves), PAIRS, model)
    assert [(row["stack"], row["layer"]) for row in rows] == [
        ("encoder", 0),
        ("encoder", 1),
        ("decoder", 0),
        ("decoder", 1),
    ]
    found = gradient_cosines(*halves)[rows[0]["block"]]
    assert rows[0]["itself"] == pytest.approx(found.diagonal().mean())
    assert rows[0]["same source"] == pytest.approx(found[0, 2])
    shares = [(of[~np.eye(4, dtype=bool)] < 0).mean() for of in gradient_cosines(*halves).values()]
    assert [row["below 0"] for row in rows] == pytest.approx(shares) and set(shares) != {0.5}


@pytest.mark.parametrize("make", [make_m2m100, make_t5], ids=["plain", "gated"])
def test_activity_by_tag_adds_up_to_activity(make):
    model = make()
    given = batches(["en-de", "de-en"], pad=model.config.pad_token_id)
    tagged = {
        pair: [{**b, "source_tags": b["input_ids"] % 3, "target_tags": b["labels"].clamp_min(0) % 3} for b in group]
        for pair, group in given.items()
    }
    for group in tagged.values():
        for batch in group:
            batch["source_tags"][batch["attention_mask"] == 0] = -100
            batch["target_tags"][batch["labels"] == -100] = -100
    found = record_tagged(model, tagged, ["x", "y", "z"])
    counts = ns.record_activations(model, given, progress=False)
    for name, count in counts.counts.items():
        assert found.counts[name].sum(1).equal(count), name
    assert all(found.positions[stack].sum(1).equal(tokens) for stack, tokens in counts.tokens.items())
    only = {
        pair: [
            {**b, **{side: torch.where(b[side] == 1, 0, -100) for side in ("source_tags", "target_tags")}} for b in of
        ]
        for pair, of in tagged.items()
    }
    ones = record_tagged(model, only, ["y"])
    assert all(ones.counts[name][:, 0].equal(count[:, 1]) for name, count in found.counts.items())
    with pytest.raises(ValueError, match="Expected tags from 0 to 1, got 2"):
        record_tagged(model, tagged, ["x", "y"])


def tagged_neurons(effect: bool):
    """Counts of two pairs, whose specific neurons fire on nouns above all, or on the same words as shared ones."""
    draw = np.random.default_rng(0)
    rows = torch.zeros(2, 120, dtype=torch.bool)
    rows[:, :40], rows[0, 40:80], rows[1, 80:] = True, True, True
    masks = NeuronMasks(
        {"e": rows}, {"e": "encoder"}, Routes(["de-en", "fr-en"], ["all"], {"de-en": (0, 0), "fr-en": (1, 0)})
    )
    activity = draw.integers(20, 200, 120)
    shares = np.full((120, 3), 1 / 3)
    if effect:
        shares[40:] = [0.6, 0.2, 0.2]
    counts = np.stack([draw.multinomial(n, share) for n, share in zip(activity, shares, strict=True)], axis=1)
    return TaggedCounts(
        ["de-en", "fr-en"], ["NOUN", "VERB", "DET"], {"e": torch.tensor(np.stack([counts, counts]))}, {}
    ), masks


def test_words_that_specific_neurons_fire_on_are_found_and_chance_is_not():
    rows = tag_rows(*tagged_neurons(effect=True), draws=199)
    assert [(row["pair"], row["specific"], row["shared"]) for row in rows] == [("de-en", 40, 40), ("fr-en", 40, 40)]
    for row in rows:
        assert row["p"] <= 0.02 and row["difference"] > 3 * row["chance"]
        assert row["ratios"]["NOUN"] == pytest.approx(1.8, abs=0.2) and row["ratios"]["VERB"] < 1
    (mean,) = mean_rows(rows)
    assert mean["pairs that differ"] == "2 of 2" and mean["difference"] > mean["chance"]
    for row in tag_rows(*tagged_neurons(effect=False), draws=199):
        assert row["p"] > 0.05


def test_sets_of_too_few_neurons_are_not_compared():
    counts, masks = tagged_neurons(effect=True)
    masks.rows["e"][0, 40:] = False
    row, other = tag_rows(counts, masks, draws=9)
    assert row["specific"] == 0 and row["p"] is None
    assert mean_rows([row])[0]["pairs that differ"] == "0 of 0"
    (mean,) = mean_rows([row, other])
    assert mean["specific"] == other["specific"] / 2 > 0, "a pair that is not tested counts as well"
    assert mean["difference"] == other["difference"]


@pytest.fixture
def tagged_file(toy, tmp_path):
    """Toy sentences with a tag for each word: whether it is the first one."""
    text = toy.sentences(12, "test")
    for code in toy.languages:
        lines = [sentence.split() for sentence in text[code]]
        rows = [
            {"sent_id": str(i), "tokens": words, "upos": ["A", *["B"] * (len(words) - 1)]}
            for i, words in enumerate(lines)
        ]
        (tmp_path / f"{code}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(tmp_path / "{lang}.jsonl")


def test_every_token_of_a_word_has_its_tag(toy_model, toy_tokenizer, toy, tagged_file):
    sentences = load_tagged(tagged_file, toy.languages, 10)
    tokens = {code: code for code in toy.languages}
    (batch,) = tagged_batches(toy_model, toy_tokenizer, sentences, ["Aa-Pv"], ["A", "B"], tokens)["Aa-Pv"]
    assert len(batch["input_ids"]) == 10
    for code, ids, tags in (("Aa", "input_ids", "source_tags"), ("Pv", "labels", "target_tags")):
        found = []
        for row, tagged in zip(batch[ids], batch[tags], strict=True):
            assert tagged.shape == row.shape
            special = [
                i for i, t in zip(row.tolist(), tagged.tolist(), strict=True) if t == -100 and i not in (-100, 1)
            ]
            assert toy_tokenizer.convert_ids_to_tokens(special) == [code, "</s>"]
            words = [toy_tokenizer.decode(row[tagged == tag]) for tag in (0, 1)]
            found.append(" ".join(words).split())
        assert sorted(found) == sorted(each.words for each in sentences[code].values())
    lengths = by_length(sentences["Aa"])
    order = {"short": 0, "medium": 1, "long": 2}
    by_size = sorted((len(each.words), order[each.tags[0]]) for each in lengths.values())
    assert [tag for _, tag in by_size] == sorted(tag for _, tag in by_size)
    nine = {str(n): TaggedSentence(["word"] * n, ["NOUN"] * n) for n in range(3, 12)}
    assert [each.tags[0] for each in by_length(nine).values()] == [*["short"] * 3, *["medium"] * 3, *["long"] * 3]


def test_tagged_text_that_does_not_fit_is_refused(tagged_file, tmp_path):
    with pytest.raises(ValueError, match="no table with the columns xpos"):
        load_tagged(tagged_file, ["Aa"], tags="xpos")
    (tmp_path / "Aa.jsonl").write_text('{"sent_id": "1", "tokens": ["a", "b"], "upos": ["A"]}\n')
    with pytest.raises(ValueError, match="1 has another number of words than of tags"):
        load_tagged(tagged_file, ["Aa"])
    (tmp_path / "Aa.jsonl").write_text('{"sent_id": "other", "tokens": ["a"], "upos": ["A"]}\n')
    with pytest.raises(ValueError, match="No sentence of .* is in all of Aa, Pv"):
        load_tagged(tagged_file, ["Aa", "Pv"])


def test_scored_batches_name_the_pair_for_adapters_only(toy_model, toy_tokenizer, toy_data):
    rows = toy_data["test"]["Pv-Aa"].select(range(3))
    tokens = {"Pv": "Pv", "Aa": "Aa"}
    (plain,) = scored_batches(toy_model, toy_tokenizer, "Pv-Aa", rows, tokens)
    assert "language_pairs" not in plain and toy_tokenizer.convert_tokens_to_ids("Aa") not in plain["labels"]
    config = ns.NeuronSpecializationConfig(language_pairs=["Pv-Aa"], task_type="SEQ_2_SEQ_LM")
    adapted = get_peft_model(copy.deepcopy(toy_model), config)
    (routed,) = scored_batches(adapted, toy_tokenizer, "Pv-Aa", rows, tokens)
    assert routed["language_pairs"] == ["Pv-Aa"] and routed["labels"].equal(plain["labels"])


@pytest.fixture
def on_toy(run_here, toy_checkpoint, toy_files, toy, tmp_path):
    """Run a recipe on the untrained toy model and its validation text."""
    given = ("--model_name_or_path", str(toy_checkpoint), "--validation_file", str(toy_files / "validation.jsonl"))
    given += ("--language_pairs", *toy.language_pairs, "--max_length", "64", "--max_sentences", "20")
    return lambda name, *words, **options: run_here(
        f"{name}.py", "--output_dir", str(tmp_path / name), *given, *words, **options
    )


def test_explain_compares_gradients_and_words(on_toy, tagged_file, toy, tmp_path):
    printed = on_toy("explain", "--gradients", "--tags", "--tagged_file", tagged_file)
    found = json.loads((tmp_path / "explain" / "results.json").read_text())
    settings = {(row["scope"], row["model"]) for row in found["gradients"]}
    assert settings == {(scope, model) for scope in ("up", "block") for model in ("dense", "masked")}
    assert found["language_pairs"] == toy.language_pairs and len(found["gradients"]) == 8
    assert {row["tags"] for row in found["words"]} == {"part of speech", "length"}
    assert found["sentences"] == 12 and "pairs that differ" in printed
    figures = {path.name for path in (tmp_path / "explain").glob("*.svg")}
    assert figures == {"gradients.svg", "tags-part-of-speech.svg", "tags-length.svg"}


def test_tagged_text_is_read_before_anything_is_recorded(on_toy, tagged_file, tmp_path, monkeypatch):
    monkeypatch.setattr(ns, "record_corpus", lambda *_, **__: pytest.fail("recorded"))
    given = ("explain", "--tags", "--tagged_file")
    assert "There is no file" in on_toy(*given, str(tmp_path / "missing-{lang}.jsonl"), fails=True)
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.is_fast", False)
    assert "use a fast tokenizer" in on_toy(*given, tagged_file, fails=True)


def test_masks_of_another_model_are_refused_before_anything_is_recorded(on_toy, tagged_file, tmp_path):
    make_masks(make_m2m100()).save_pretrained(tmp_path / "others")
    words = ("explain", "--tags", "--tagged_file", tagged_file, "--adapter", str(tmp_path / "others"))
    assert "The masks are of another model: they have" in on_toy(*words, fails=True)


def test_an_activity_of_zero_counts_in_the_mean_of_a_tag():
    rows = [{"stack": "encoder", "layer": 0, "ratios": {"NOUN": ratio}} for ratio in (0.0, 2.0, None)]
    assert mask_plots._log_ratios(rows, ["NOUN", "VERB"])[:, 0] == pytest.approx([(-4 + 1) / 2, np.nan], nan_ok=True)


def test_masks_are_identified_again_on_other_text_and_after_training(
    on_toy, toy_model, toy_tokenizer, toy_data, toy_checkpoint, toy_files, tmp_path
):
    kept = tmp_path / "comparison"
    for seed in ("seed-0", "seed-1"):
        shutil.copytree(toy_checkpoint, kept / "fine_tune" / seed / "model")
    masks = ns.CumulativeThreshold(0.5).select(ns.record_corpus(toy_model, toy_tokenizer, toy_data["validation"]))
    config = ns.NeuronSpecializationConfig(masks=masks, trainable="full", task_type="SEQ_2_SEQ_LM")
    adapted = get_peft_model(toy_model, config)
    adapted.save_pretrained(kept / "ours" / "seed-0" / "adapter")
    text = ("--train_file", str(toy_files / "train.jsonl"), "--other_files", f"tests={toy_files / 'test.jsonl'}")
    on_toy("reidentify", *text, "--comparison", str(kept))
    rows = json.loads((tmp_path / "reidentify" / "results.json").read_text())["rows"]
    own = {row["masks"]: row["own"] for row in rows if row["stack"] == "encoder"}
    trained = ["fine_tune", "ours, under its masks", "ours, masks taken off"]
    assert list(own) == ["half against half of the text", "training text", "text of tests", *trained]
    assert own["fine_tune"] == own["ours, masks taken off"] == 1 > own["ours, under its masks"]
    assert all(row["own"] > row["chance"] for row in rows)
    assert all(row["times"] == (2 if row["masks"] == "fine_tune" else 1) for row in rows)
    assert {path.name for path in (tmp_path / "reidentify").iterdir()} == {
        "results.json", "agreement.svg", "agreement.png",
    }  # fmt: skip
    assert "keeps no model of lora" in on_toy("reidentify", "--comparison", str(kept), "--methods", "lora", fails=True)
