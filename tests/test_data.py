"""Loading, checking, encoding and batching parallel text."""

import hashlib
import json
import os
import shutil

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from neuron_specialization.translation import encoding
from neuron_specialization.translation.arguments import DataArguments
from neuron_specialization.translation.batching import DirectionBatchSampler, TranslationCollator
from neuron_specialization.translation.check import check_parallel
from neuron_specialization.translation.data import load_parallel
from neuron_specialization.translation.encoding import encode_parallel
from neuron_specialization.translation.tokenization import resolve_tokens

ROWS = {
    "en": ["a cat", "two dogs", None, 'he said "no"'],
    "de": ["eine Katze", "zwei Hunde", "drei", "er sagte nein"],
    "fr": ["un chat", None, "trois", "il a dit non"],
    "split": ["train", "train", "train", "test"],
}


def test_splits_and_limits(tmp_path):
    path = str(tmp_path / "text.parquet")
    pandas.DataFrame(ROWS).to_parquet(path)
    with pytest.raises(ValueError, match=r"no rows of the split 'dev': .* 'train' \(3 rows\), 'test' \(1 rows\)"):
        load_parallel(path, ["en-de"], split="dev")
    arguments = DataArguments(language_pairs=["en-de"], validation_file=path, splits=["validation=test"])
    assert len(arguments.load("validation")["en-de"]) == 1
    assert load_parallel(path, ["en-de"], split="test")["en-de"]["target"][:] == ["er sagte nein"]
    assert len(load_parallel(path, ["en-de"], split="train", max_sentences=1)["en-de"]) == 1


def test_long_sentence_pairs_are_left_out_of_every_split(tmp_path):
    rows = [("two dogs", "zwei Hunde!"), ("a cat", "äöü äöü äö"), ("a cat on a mat", "Katze"), ("yes", "ja")]
    path = str(tmp_path / "text.jsonl")
    pandas.DataFrame(rows, columns=["en", "de"]).to_json(path, orient="records", lines=True)
    data = DataArguments(
        language_pairs=["en-de", "de-en"], train_file=path, validation_file=path, max_characters=10, max_sentences=1
    )
    kept = [rows[1], rows[3]]  # characters are counted, not bytes
    for pair, of in data.load("validation").items():
        assert [tuple(row.values())[:: 1 if pair == "en-de" else -1] for row in of] == kept
    assert data.load("train")["de-en"]["target"][:] == ["a cat"], "limited after the long ones are gone"
    with pytest.raises(ValueError, match="no row has text of at most 1 characters on both sides"):
        load_parallel(path, ["en-de"], max_characters=1)


def test_training_data_is_limited_by_language_to_nested_whole_documents(tmp_path):
    chapters = {f"GEN {number}": 3 + number for number in range(1, 9)}
    rows = [
        (f"{name}:{verse}", f"en {name} {verse}", f"x {verse}") for name, n in chapters.items() for verse in range(n)
    ]
    text = pandas.DataFrame(rows, columns=["id", "en", "de"])
    text["fi"], text["vi"], path = text["de"], text["de"], str(tmp_path / "bible.parquet")
    text.loc[0, "fi"] = None
    text.to_parquet(path)
    pairs = ["en-de", "en-fi", "fi-en", "en-vi"]
    limited = {"train_sentences": ["fi=40", "vi=1"], "document_column": "id"}
    data = DataArguments(language_pairs=pairs, train_file=path, validation_file=path, **limited)
    loaded = {pair: list(rows["target" if pair == "fi-en" else "source"]) for pair, rows in data.load("train").items()}
    assert len(loaded["en-de"]) == len(rows) and loaded["en-fi"] == loaded["fi-en"]
    for pair, least in (("en-fi", 30), ("en-vi", 4)):
        assert least <= len(loaded[pair]) <= 40
        documents = [sentence.rpartition(" ")[0].removeprefix("en ") for sentence in loaded[pair]]
        missing = loaded["en-de"][0].rpartition(" ")[0] in {f"en {name}" for name in documents}
        whole = sum(chapters[name] for name in set(documents))
        assert len(documents) == whole - (missing and pair == "en-fi"), "whole chapters"
    assert set(loaded["en-vi"]) < set(loaded["en-fi"]) | set(loaded["en-de"][:1])
    assert len(data.load("validation")["en-vi"]) == len(rows), "held-out data is not limited"
    top = DataArguments(language_pairs=pairs, train_file=path, train_sentences=["fi=5"], max_sentences=20).load(
        "train"
    )
    assert [len(top[pair]) for pair in pairs] == [20, 5, 5, 20] and top["en-fi"]["source"][0] == loaded["en-de"][1]
    with pytest.raises(ValueError, match="no column 'verse' for en-fi"):
        DataArguments(language_pairs=pairs, train_file=path, train_sentences=["fi=5"], document_column="verse").load(
            "train"
        )


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"train_sentences": ["fi=3", "vi=5"]}, "limits vi, a language of no pair: en, fi"),
        ({"train_sentences": ["fi=x"]}, "numbers of at least 1, such as de=3000; got fi=x"),
        ({"train_sentences": ["fi=0"]}, "numbers of at least 1.* got fi=0"),
        ({"max_sentences": 0}, "max_sentences is a number of at least 1, got 0"),
    ],
)
def test_limits_that_mean_nothing_are_refused(tmp_path, limits, message):
    """A misspelt language would leave its training data whole."""
    pandas.DataFrame({"en": ["a"], "fi": ["b"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        DataArguments(language_pairs=["en-fi"], train_file=str(tmp_path / "x.parquet"), **limits).load("train")


def test_one_file_per_pair_serves_both_directions(tmp_path):
    pandas.DataFrame({"en": ["a"], "de": ["b"]}).to_parquet(tmp_path / "en-de.parquet")
    data = load_parallel(str(tmp_path / "{pair}.parquet"), ["de-en", "en-de"])
    assert data["de-en"][0] == {"source": "b", "target": "a"}
    assert data["en-de"][0] == {"source": "a", "target": "b"}


def test_columns_can_be_mapped(tmp_path):
    pandas.DataFrame({"eng": ["a"], "deu": ["b"]}).to_parquet(tmp_path / "x.parquet")
    data = load_parallel(str(tmp_path / "x.parquet"), ["en-de"], columns={"en": "eng", "de": "deu"})
    assert data["en-de"][0] == {"source": "a", "target": "b"}


def test_empty_sides_of_held_out_data_are_told(tmp_path):
    lines = [{"en": "a", "de": "b"}, {"en": "", "de": "c"}, {"en": "d", "de": "  "}]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = DataArguments(language_pairs=["en-de"], test_file=str(tmp_path / "test.jsonl"))
    with pytest.warns(UserWarning, match="A side is empty in sentence pairs of the test data: 2 of en-de."):
        assert len(arguments.load("test")["en-de"]) == 3


def test_bad_data_is_refused(tmp_path):
    path = str(tmp_path / "text.parquet")
    pandas.DataFrame({**ROWS, "it": [None] * 4}).to_parquet(path)
    with pytest.raises(ValueError, match="no column 'cs' for en-cs; it has en, de, fr, split, it"):
        load_parallel(path, ["en-cs"])
    with pytest.raises(ValueError, match="no sentence pair for en-it"):
        load_parallel(path, ["en-it"])
    with pytest.raises(ValueError, match="no file .*missing.parquet"):
        load_parallel(str(tmp_path / "missing.parquet"), ["en-de"])
    with pytest.raises(ValueError, match="'number' of .* holds int64, expected text"):
        pandas.DataFrame({"en": ["a"], "number": [1]}).to_parquet(tmp_path / "number.parquet")
        load_parallel(tmp_path / "number.parquet", ["en-number"])
    with pytest.raises(ValueError, match="at least one language pair"):
        load_parallel(path, [])
    with pytest.raises(ValueError, match="expected a file ending in .parquet, .jsonl"):
        load_parallel("no/such/dataset", ["en-de"])


def test_loading_and_encoding_little_data_shows_no_bars(toy, toy_files, toy_tokenizer, tmp_path, capsys):
    shutil.copy(toy_files / "test.jsonl", tmp_path / "new.jsonl")
    data = load_parallel(tmp_path / "new.jsonl", toy.language_pairs)
    encode_parallel(data, toy_tokenizer, resolve_tokens(toy_tokenizer, toy.language_pairs), max_length=19)
    assert capsys.readouterr().err == ""


def pairs(*rows: tuple[str, str]) -> Dataset:
    return Dataset.from_dict({"source": [r[0] for r in rows], "target": [r[1] for r in rows]})


def test_the_data_check_counts_and_drops_only_if_asked():
    good = ("a good sentence", "ein guter Satz")
    train = pairs(
        good, good, ("", "leer"), ("short", "x" * 200), ("seen in the test", "neu"), ("new", "im Test gesehen")
    )
    held_out = pairs(("seen in the test", "anders"), ("other", "im Test gesehen"))
    kept, checks = check_parallel({"en-de": train}, [{"en-de": held_out}])
    check = checks["en-de"]
    assert (check.sentence_pairs, check.empty, check.duplicates, check.length_ratio, check.overlap) == (6, 1, 1, 1, 2)
    assert len(kept["en-de"]) == 6 and check.dropped == 0
    kept, checks = check_parallel({"en-de": train}, [{"en-de": held_out}], drop=True)
    assert kept["en-de"][:] == pairs(good)[:] and checks["en-de"].dropped == 5
    with pytest.raises(ValueError, match="drop every sentence pair of en-de"):
        check_parallel({"en-de": pairs(("", ""))}, drop=True)


def faults_of(rows, held_out) -> tuple[list[int], list[int]]:
    """Count empty, duplicates, length_ratio and overlap the slow way, and say which rows have none."""
    ratio = np.exp(np.median([np.log(len(t) / len(s)) for s, t in rows if s and t]))
    sources, targets = {s for s, _ in held_out}, {t for _, t in held_out}
    counts, good, seen = [0] * 4, [], set()
    for i, (source, target) in enumerate(rows):
        shorter, longer = sorted((len(source) * ratio**0.5, len(target) / ratio**0.5))
        found = [
            not source.strip() or not target.strip(),
            (source, target) in seen,
            longer > 3 * shorter + 20,
            source in sources or target in targets,
        ]
        seen.add((source, target))
        counts = [count + f for count, f in zip(counts, found, strict=True)]
        good += [] if any(found) else [i]
    return counts, good


@pytest.mark.parametrize("selected", [False, True])
def test_the_data_check_counts_what_python_sets_count(monkeypatch, selected):
    monkeypatch.setattr("neuron_specialization.translation.arrow.BATCH", 300)
    draw = np.random.default_rng(0)
    words = ["ein", "Übung", "語", "𝒳y", " ", "\u3000", "\u2028", "\t", "\x1f", ""]

    def sentence() -> str:
        return "".join(draw.choice(words, size=draw.choice([0, 1, 2, 3, 60])))

    rows = [(sentence(), sentence()) for _ in range(2000)]
    held_out = [rows[5], ("ein", "?"), ("?", "語語")]
    data = pairs(*rows)
    if selected:
        order = draw.permutation(2000)[:1500]
        rows, data = [rows[i] for i in order], data.select(order)
    counts, good = faults_of(rows, held_out)
    # what held-out data comes in may be read only once
    train = {"en-fr": pairs(("a", "b")), "en-de": data}
    kept, checks = check_parallel(train, iter([{"en-de": pairs(*held_out)}]), drop=True)
    check = checks["en-de"]
    assert all(counts) and [check.empty, check.duplicates, check.length_ratio, check.overlap] == counts
    assert kept["en-de"]["source"][:] == [rows[i][0] for i in good] and check.dropped == len(rows) - len(good)


def test_length_ratios_are_judged_by_the_languages_own():
    english = ["This is a sentence with a number of words in it, such as " + "many " * i for i in range(1, 100)]
    chinese = ["这是一个有许多单词的句子" + "多" * i for i in range(1, 100)]
    rows = [*zip(english, chinese, strict=True), ("Short.", "长" * 100), (english[-1], "短")]
    for flip in (1, -1):
        _, checks = check_parallel({"en-zh": pairs(*(row[::flip] for row in rows))})
        assert checks["en-zh"].length_ratio == 2


def sampler(**changes) -> DirectionBatchSampler:
    directions = np.repeat([0, 1], [900, 100])
    lengths = np.random.default_rng(0).integers(2, 60, 1000)
    options = {"batch_size": 16, "num_batches": 400, "temperature": 1.0, "seed": 3, **changes}
    return DirectionBatchSampler(directions, lengths, **options)


def test_batches_hold_one_direction_of_similar_length():
    made = sampler()
    batches = list(made)
    assert len(batches) == len(made) == 400
    assert all(len({index >= 900 for index in batch}) == 1 for batch in batches)
    spread = [np.ptp(made._lengths[batch]) for batch in batches if batch[0] < 900]
    assert np.mean(spread) < 6, "a random batch of 16 spreads over more than 50 tokens"


def test_the_sampler_depends_on_its_seed_only():
    assert list(sampler()) == list(sampler())
    assert list(sampler()) != list(sampler(seed=4))
    assert list(sampler(num_batches=50)) == list(sampler())[:50], "a longer run begins like a shorter one"
    assert not hasattr(sampler(), "batch_size"), "accelerate would split batches between processes"


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.1), (5.0, 0.1**0.2 / (0.1**0.2 + 0.9**0.2)), (1e9, 0.5)])
def test_temperature_sets_the_shares_of_directions(temperature, share):
    made = sampler(temperature=temperature, num_batches=4000)
    assert made.probabilities[1] == pytest.approx(share, rel=1e-6)
    assert np.mean([batch[0] >= 900 for batch in made]) == pytest.approx(share, abs=0.03)


def test_every_sentence_is_used_before_any_is_used_again():
    made = sampler(num_batches=200)
    seen = [index for batch in made for index in batch if index < 900]
    assert len(set(seen[:896])) == 896


def test_sampled_batches_stay_those_of_earlier_versions():
    batches = list(sampler(num_batches=500, batch_size=7))
    assert hashlib.sha256(repr(batches).encode()).hexdigest()[:16] == "681325ba4302c4d1"


@pytest.mark.parametrize("temperature", [0, -1])
def test_a_temperature_of_zero_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature T must be above 0"):
        sampler(temperature=temperature)


def test_text_is_encoded_once_however_it_is_loaded(toy, toy_files, toy_tokenizer, tmp_path):
    def encode(path, tokenizer, **options):
        tokens = resolve_tokens(tokenizer, toy.language_pairs)
        return encode_parallel(load_parallel(str(path), toy.language_pairs), tokenizer, tokens, **options)

    first = encode(toy_files / "test.jsonl", toy_tokenizer)
    (cached,) = {entry["filename"] for entry in first.cache_files}
    written = os.stat(cached).st_mtime_ns
    shutil.copy(toy_files / "test.jsonl", tmp_path / "moved.jsonl")
    pandas.read_json(toy_files / "test.jsonl", lines=True).to_parquet(tmp_path / "other.parquet")
    used = AutoTokenizer.from_pretrained(saved(toy_tokenizer, tmp_path / "tokenizer"))
    used(["Pv"] * 3, padding=True, truncation=True, max_length=2)
    used.src_lang = toy.languages[2]
    for path in ("moved.jsonl", "other.parquet"):
        again = encode(tmp_path / path, used)
        assert again.cache_files == first.cache_files and again[:] == first[:]
    assert os.stat(cached).st_mtime_ns == written
    lines = (tmp_path / "moved.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "changed.jsonl").write_text("".join(lines[:-1] + [lines[0]]))
    assert encode(tmp_path / "changed.jsonl", toy_tokenizer)[-1]["labels"] != first[-1]["labels"]
    assert max(map(len, encode(tmp_path / "moved.jsonl", toy_tokenizer, max_length=5)["labels"])) == 5
    used.add_tokens(["zz"])
    assert encode(tmp_path / "moved.jsonl", used).cache_files != first.cache_files


def saved(tokenizer, directory) -> str:
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_several_processes_encode_the_same(toy, toy_data, toy_tokenizer, monkeypatch):
    tokens = resolve_tokens(toy_tokenizer, toy.language_pairs)
    one = encode_parallel(toy_data["train"], toy_tokenizer, tokens, max_length=20)[:]
    monkeypatch.setattr(encoding, "_digest", lambda *_: "b" * 32)  # or the first one's would be read
    monkeypatch.setattr(encoding, "_BATCH", 70)
    several = encode_parallel(toy_data["train"], toy_tokenizer, tokens, max_length=20, num_workers=3)
    assert len(several.cache_files) == 3 and several[:] == one
    assert one["length"] == [len(s) + len(t) for s, t in zip(one["input_ids"], one["labels"], strict=True)]
    assert one["language_pair"] == sorted(one["language_pair"])


def test_encoded_batches_carry_tags_labels_and_decoder_inputs(toy, toy_data, toy_tokenizer, toy_model):
    tokens = resolve_tokens(toy_tokenizer, toy.language_pairs)
    encoded = encode_parallel(toy_data["test"], toy_tokenizer, tokens)
    assert len(encoded) == 20 * len(toy.language_pairs)
    example = encoded[0]
    assert toy_tokenizer.convert_ids_to_tokens(example["input_ids"])[0] == "Pv"
    assert toy_tokenizer.convert_ids_to_tokens(example["labels"])[0] == "Aa"
    collate = TranslationCollator(toy_tokenizer, toy_model, torch.arange(10, 14))
    batch = collate([encoded[0], encoded[25]])
    start, pad = toy_model.config.decoder_start_token_id, toy_tokenizer.pad_token_id
    for row, example in enumerate([encoded[0], encoded[25]]):
        labels, inputs = batch["labels"][row], batch["decoder_input_ids"][row]
        assert labels[labels != -100].tolist() == example["labels"]
        assert inputs[inputs != pad].tolist() == [start, *example["labels"]][: (inputs != pad).sum()]
        assert batch["attention_mask"][row].sum() == len(example["input_ids"])
    assert batch["language_pairs"].tolist() == [10, 11]
    expected = (
        toy_model.prepare_decoder_input_ids_from_labels(batch["labels"])
        if hasattr(toy_model, "prepare_decoder_input_ids_from_labels")
        else batch["decoder_input_ids"]
    )
    assert batch["decoder_input_ids"].equal(expected)
    with torch.no_grad():
        loss = toy_model(**{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "labels")}).loss
        same = toy_model(**{k: v for k, v in batch.items() if k != "language_pairs"}).loss
    torch.testing.assert_close(loss, same)
