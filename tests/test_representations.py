"""Representations compared: what must be 1, what must lie above its control, and the recipe as users run it."""

import copy
import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from neuron_specialization.analysis.representation_report import report_tables
from neuron_specialization.analysis.representations import (
    groups_of,
    language_similarity,
    layer_similarity,
    misaligned,
    retrieval_accuracy,
    source_similarity,
)
from neuron_specialization.analysis.seeds import compare, summarize
from neuron_specialization.analysis.spectrum import singular_values
from neuron_specialization.analysis.spectrum_change import matrix_types, spectra, spectrum_changes
from neuron_specialization.translation import arrow, data
from neuron_specialization.translation.checkpoints import load_checkpoint
from neuron_specialization.translation.data import load_multiparallel
from neuron_specialization.translation.encoders import encode_sentences
from neuron_specialization.translation.representations import encode_languages, pooled_states, token_states

from . import architectures
from .conftest import make_m2m100, make_masks, make_t5

LANGUAGES = ["Pv", "Aa", "Ba"]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def sentences(toy_files):
    return load_multiparallel(toy_files / "train.jsonl", LANGUAGES, max_sentences=60)[0]


def test_rows_that_are_no_translations_are_left_out_and_counted(tmp_path):
    rows = [{"en": f"one {i}", "de": f"eins {i}"} for i in range(30)]
    rows[3]["de"], rows[4]["en"], rows[6]["de"] = None, "  ", "eins 5"
    Dataset.from_list([{**row, "split": "test"} for row in rows]).to_parquet(tmp_path / "all.parquet")
    found, counts = load_multiparallel(tmp_path / "all.parquet", ["de", "en"], split="test")
    assert counts == {"rows": 30, "incomplete": 2, "repeated": 1, "kept": 27}
    assert found["de"][3:5] == ["eins 5", "eins 7"] and found["en"][3:5] == ["one 5", "one 7"]
    limited, counts = load_multiparallel(tmp_path / "all.parquet", ["de", "en"], max_sentences=20)
    assert limited == {code: texts[:20] for code, texts in found.items()} and counts["kept"] == 20
    with pytest.raises(ValueError, match="has no column 'fr' for these languages"):
        load_multiparallel(tmp_path / "all.parquet", ["en", "fr"])
    with pytest.raises(ValueError, match="at least two languages"):
        load_multiparallel(tmp_path / "all.parquet", ["en", "en"])
    Dataset.from_list(rows[:21]).to_parquet(tmp_path / "few.parquet")
    with pytest.raises(ValueError, match="18 rows with text of their own.*of 21; expected at least 20"):
        load_multiparallel(tmp_path / "few.parquet", ["en", "de"])


def test_no_more_is_read_than_there_are_sentences_to_find(tmp_path, monkeypatch):
    Dataset.from_list([{"en": f"one {i}", "de": f"eins {i}"} for i in range(100)]).to_parquet(tmp_path / "all.parquet")
    read = []

    def counted(rows, columns):
        for batch in arrow.arrow_batches(rows, columns):
            read.append(len(batch))
            yield batch

    monkeypatch.setattr(arrow, "BATCH", 15)
    monkeypatch.setattr(data, "arrow_batches", counted)
    found, counts = load_multiparallel(tmp_path / "all.parquet", ["de", "en"], max_sentences=20)
    assert found["en"] == [f"one {i}" for i in range(20)] and counts["rows"] == 20 and read == [15, 15]


def test_only_a_sentences_own_tokens_count(toy_checkpoint, sentences, tmp_path):
    """Whatever the batch's padding, and without the tag and the end of sentence, computed by hand."""
    model, tokenizer = load_checkpoint(str(toy_checkpoint))
    encoder = model.eval().get_encoder()
    (row,) = encode_sentences(tokenizer, [sentences["Aa"][0]], "Aa")
    tokenizer.src_lang = "Aa"
    assert row["input_ids"] == tokenizer(sentences["Aa"][0])["input_ids"]
    own = [i for i, token in enumerate(row["input_ids"]) if token not in tokenizer.all_special_ids]
    assert [i for i, counted in enumerate(row["content"]) if counted] == own and len(own) == len(row["content"]) - 2
    rows = encode_languages(encoder, tokenizer, sentences, {}, 64)["Aa"]
    pooled = pooled_states(encoder, rows, tmp_path / "states", batch_size=7)
    tokens = [
        np.concatenate(layer) for layer in zip(*(batch[0] for batch in token_states([encoder], rows, 7)), strict=True)
    ]
    assert pooled.shape == (2, 60, 32) and len(tokens) == 2
    place = 0
    for i, each in enumerate(rows):
        with torch.no_grad():
            output = encoder(torch.tensor([each["input_ids"]]), output_hidden_states=True)
        first, last = output.hidden_states[0][0, 1:-1], output.last_hidden_state[0, 1:-1]
        for layer, states in enumerate((first, last)):
            torch.testing.assert_close(torch.tensor(pooled[layer, i]), states.mean(0), rtol=1e-4, atol=1e-5)
            found = torch.tensor(tokens[layer][place : place + len(states)])
            torch.testing.assert_close(found, states, rtol=1e-4, atol=1e-5)
        place += len(first)


def test_rotated_states_are_similar_and_misaligned_ones_are_not():
    states = {"en": draw(2, 80, 6).numpy(), "de": draw(2, 80, 6, seed=1).numpy()}
    rotation = torch.linalg.qr(draw(6, 6, seed=2))[0].numpy()
    rotated = {code: 3 * each @ rotation for code, each in states.items()}
    rows = source_similarity(states, rotated)
    assert [(row["language"], row["layer"]) for row in rows] == [("en", 0), ("en", 1), ("de", 0), ("de", 1)]
    for row in rows:
        assert row["cka"] == pytest.approx(1, abs=1e-5) and abs(row["cka_misaligned"]) < 0.3
    with pytest.raises(ValueError, match="encoders of as many layers.*got 1 and 2"):
        layer_similarity([([draw(9, 2)] * 2, [draw(9, 2)] * 3)])


def test_translations_lie_above_their_control():
    """Meaning that both languages share, beside what is each language's own."""
    meaning = draw(60, 8)
    states = {
        code: torch.stack([draw(60, 8, seed=i), 3 * meaning + draw(60, 8, seed=i)]).numpy()
        for i, code in [(1, "a"), (2, "b")]
    }
    apart, shared = language_similarity(states)
    assert abs(apart["cka"]) < 0.2 and apart["retrieval"] < 15
    assert shared["cka"] > 0.7 and shared["retrieval"] > 75, "the upper layer"
    assert abs(shared["cka_misaligned"]) < 0.2 and shared["retrieval_misaligned"] < 10
    assert retrieval_accuracy(meaning, meaning * 5) == 100 and retrieval_accuracy(meaning, misaligned(meaning)) == 0


def test_languages_and_pairs_are_grouped_by_what_was_seen():
    assert groups_of(["de"], ["de"]) == ["all", "seen"] and groups_of(["fi"], ["de"]) == ["all", "unseen"]
    assert groups_of(["de", "fi"], ["de"]) == ["all", "seen and unseen"] and groups_of(["de"], []) == ["all"]


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (make_m2m100, {"up", "down"}),
        (make_t5, {"up", "gate", "down"}),
        (lambda: architectures.make("t5gemma"), {"up", "gate", "down"}),
    ],
    ids=["m2m100", "t5", "t5gemma"],
)
def test_every_matrix_has_a_type(make, blocks):
    model = make()
    types = matrix_types(model)
    found = {types[name] for name in singular_values(model)}
    attention = {f"{side} {role}" for side in ("encoder", "decoder", "cross") for role in "qkvo"}
    ffn = {f"{side} {role}" for side in ("encoder", "decoder") for role in blocks}
    assert found - {"output", "other"} == attention | ffn | {"embedding"}


def test_spectra_of_a_model_against_itself_and_scaled():
    model = make_m2m100()
    before, scaled = spectra(model), copy.deepcopy(model)
    for row in spectrum_changes(before, before):
        assert set(row["ratio"].values()) == {1.0}
    with torch.no_grad():
        scaled.model.encoder.layers[1].fc2.weight.mul_(2)
        scaled.model.decoder.layer_norm.weight.mul_(2)  # its gain is the output's, which shares the embedding's weight
    for row in spectrum_changes(before, spectra(scaled)):
        times = 2 if row["matrix"] in ("model.encoder.layers.1.fc2.weight", "lm_head.weight") else 1
        expected = {"mean": times, "frobenius": times, "spectral": times}
        for name, ratio in row["ratio"].items():
            assert ratio == pytest.approx(expected.get(name, 1), rel=1e-5), (row["matrix"], name)
    with pytest.raises(ValueError, match=r"fc1.weight is \[20, 16\] in one and \[24, 16\]|\[20, 16\]"):
        spectrum_changes(before, spectra(make_m2m100(d_ff=24)))


def test_seeds_are_summarized_and_tested_in_pairs():
    about = {"measure": "retrieval", "group": "all", "place": "layer 0"}
    seeds = {"source": [50.0], "cp": [60.0, 62.0, 61.0], "control": [51.0, 53.5, 52.0], "one": [55.0]}
    values = [
        {**about, "model": model, "seed": seed, "value": value + offset}
        for model, of in seeds.items()
        for seed, value in enumerate(of)
        for offset in (-1, 1)  # two languages
    ]
    summary = {row["model"]: row for row in summarize(values)}
    assert summary["cp"]["mean"] == 61 and summary["cp"]["deviation"] == 1 and summary["cp"]["seeds"] == 3
    assert summary["source"]["mean"] == 50 and summary["source"]["deviation"] is None
    tests = {(row["model"], row["compared_with"]): row for row in compare(values, "source")}
    assert tests.keys() == {("cp", "source"), ("control", "source"), ("control", "cp")}
    assert tests["control", "cp"]["difference"] == pytest.approx(52.1667 - 61, abs=1e-3)
    assert tests["cp", "source"]["difference"] == pytest.approx(11)
    assert tests["cp", "source"]["p"] == pytest.approx(0.00274, abs=1e-4)  # t = 11 / (1 / √3), 2 degrees of freedom
    # Benjamini and Hochberg, of three tests
    found = sorted((row["p"], row["p_adjusted"]) for row in tests.values())
    expected = [
        3 * found[0][0],
        min(1.5 * found[1][0], found[2][0]),
        found[2][0],
    ]
    assert [adjusted for _, adjusted in found] == pytest.approx(expected)
    paired = np.array([51.0, 53.5, 52.0]) - np.array([60.0, 62.0, 61.0])
    t = paired.mean() / (paired.std(ddof=1) / 3**0.5)
    assert tests["control", "cp"]["p"] == pytest.approx(1 - abs(t) / (2 + t * t) ** 0.5)  # 2 degrees of freedom
    (table,) = report_tables(summarize(values), "source").values()
    assert table[1] == {"languages": "all", "model": "cp", "layer 0": "61.0 ± 1.0"}


def test_models_are_paired_by_seed():
    about = {"measure": "retrieval", "group": "all", "place": "layer 0"}
    seeds = {"source": {0: 50.0, 1: 52.0}, "cp": {0: 60.0, 1: 62.0, 2: 64.0}, "control": {1: 61.0, 2: 63.5, 3: 65.0}}
    values = [{**about, "model": m, "seed": s, "value": v} for m, of in seeds.items() for s, v in of.items()]
    tests = {(row["model"], row["compared_with"]): row["difference"] for row in compare(values, "source")}
    assert tests == {
        ("cp", "source"): pytest.approx(62 - 51),
        ("control", "source"): pytest.approx(63.1667 - 51, abs=1e-3),
    }


def test_text_has_room_within_the_longest_input(toy_checkpoint):
    _, tokenizer = load_checkpoint(str(toy_checkpoint))
    around = len(tokenizer("")["input_ids"])
    (row,) = encode_sentences(tokenizer, ["ba bu"], "Aa", max_length=around + 1)
    assert len(row["input_ids"]) == around + 1 and sum(row["content"]) == 1
    with pytest.raises(ValueError, match=f"max_length is {around}, and the tokens around a text are {around}"):
        encode_sentences(tokenizer, ["ba bu"], "Aa", max_length=around)


@pytest.fixture
def options(sentences, tmp_path):
    """In place of Aa, Pv with its words in another order: translations that an embedding alone can tell."""
    reordered = [" ".join(reversed(text.split())) for text in sentences["Pv"]]
    Dataset.from_dict({**sentences, "Aa": reordered}).to_parquet(tmp_path / "parallel.parquet")
    where = ["--test_file", str(tmp_path / "parallel.parquet"), "--languages", *LANGUAGES]
    return [*where, "--seen", "Pv", "Aa", "--output_dir", str(tmp_path / "out")]


def test_the_recipe_finds_a_copy_the_same_and_another_model_not(run_here, options, toy_checkpoint, tmp_path):
    model, tokenizer = load_checkpoint(str(toy_checkpoint))
    models = ["--models", f"source={toy_checkpoint}", f"copy={toy_checkpoint}"]
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        for each in (model, tokenizer):
            each.save_pretrained(tmp_path / f"cp-{seed}")
        models.append(f"cp={tmp_path / f'cp-{seed}'}")
    for level, named in (("tokens", [*models[:2], models[3]]), ("sentences", models)):
        printed = run_here("compare_representations.py", *options, *named, "--level", level)
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        similar = results["source_similarity"]
        assert len(similar) == len(named) * 3 * 2, "models with the control, languages, layers"
        for row in similar:
            if row["model"] in ("source", "copy"):
                assert row["cka"] == pytest.approx(1)
            elif row["model"] == "cp":
                assert row["cka"] < 0.99
        assert "CKA to the source" in printed and "seen and unseen" in printed
    assert "Paired tests" in printed
    spectrum = {row["model"]: row["ratio"]["frobenius"] for row in results["spectra"] if row["type"] == "encoder q"}
    assert spectrum["source"] == spectrum["copy"] == 1 and spectrum["cp"] != 1 and "random" not in spectrum
    alike = [row for row in results["language_similarity"] if row["model"] == "source" and row["layer"] == 0]
    assert [row["languages"] for row in alike] == [["Pv", "Aa"], ["Pv", "Ba"], ["Aa", "Ba"]]
    assert alike[0]["retrieval"] > 50 > alike[0]["retrieval_misaligned"] and alike[0]["cka"] > 0.8
    assert alike[0]["cka"] > alike[0]["cka_misaligned"] + 0.5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("results.json", "tables.md"),
        *(f"{name}.{kind}" for name in ("source_cka", "languages", "spectra") for kind in ("svg", "png")),
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--models", "source"], "Expected name=value"),
        (["--models", "random={checkpoint}"], "cannot name a model"),
        (["--models", "source={nowhere}"], "Cannot load"),
        (["--languages", "Pv", "Aa", "Xx"], "no column 'Xx'"),
        (["--seen", "Cb"], "--seen among --languages"),
        (["--level", "words"], "--level sentences or tokens"),
        (["--models", "a={checkpoint}", "b={other}", "--level", "tokens"], "not cut text into the same tokens"),
        (["--models", "a={checkpoint}", "b={smaller}"], "Expected models of one architecture"),
        (["--models", "a={checkpoint}", "b={adapter}"], "is an adapter, under which each language has an encoder"),
    ],
)
def test_bad_input_is_one_sentence(run_here, options, toy, toy_data, toy_checkpoint, tmp_path, wrong, message):
    from neuron_specialization.translation.tokenization import train_tokenizer

    places = {name: tmp_path / name for name in ("nowhere", "other", "smaller", "adapter")}
    places["checkpoint"] = toy_checkpoint
    make_m2m100(d_ff=24).save_pretrained(places["smaller"])
    make_masks(make_m2m100()).save_pretrained(places["adapter"])
    model, _ = load_checkpoint(str(toy_checkpoint))
    model.save_pretrained(places["other"])
    text = (s for rows in toy_data["train"].values() for s in rows["source"])
    train_tokenizer(text, toy.languages, 100, 64).save_pretrained(places["other"])
    words = ["--models", f"source={toy_checkpoint}", *(word.format(**places) for word in wrong)]
    error = run_here("compare_representations.py", *options, *words, fails=True)
    assert error.splitlines()[-1].startswith("Error: ") and message in error
    assert not (tmp_path / "out" / "results.json").exists()
