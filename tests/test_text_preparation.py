"""Text of a run from several corpora: nothing that is tested on, nothing twice, files that the other recipes read."""

import json

import pytest
from datasets import Dataset

from neuron_specialization.translation.data import load_parallel

CONFIG = """
languages: [en, de]
corpora:
  bible: {file: "bible/{split}.parquet", text: "{language}", languages: [en, de]}
  topics: {file: "topics/{language}.parquet", text: text, languages: [en], splits: [train, test]}
  tags: {file: "tags/{language}.parquet", text: text, languages: [en, de], splits: [test]}
parallel: bible/{split}.parquet
max_characters: 40
max_parallel_characters: 30
max_held_out: 3
validation_lines: 2
"""


@pytest.fixture
def options(tmp_path):
    def write(name, rows):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(tmp_path / "data" / f"{name}.parquet")

    train = [{"en": f"verse {i}", "de": f"Vers {i}"} for i in range(10)]
    train += [{"en": "Held out  in topics", "de": None}, {"en": "VERSE 3", "de": "Gesang"}]
    train += [{"en": "x" * 35, "de": "kurz"}, {"en": "x" * 41, "de": "Getaggt"}, {"en": "test 1", "de": "neu"}]
    write("bible/train", train)
    for split in ("validation", "test"):
        write(f"bible/{split}", [{"en": f"{split} {i}", "de": f"{split} auf Deutsch {i}"} for i in range(5)])
    topics = [("train", "verse 4"), ("train", "a topic"), ("test", "held out in TOPICS")]
    write("topics/en", [{"split": split, "text": text} for split, text in topics])
    write("tags/de", [{"text": "Getaggt"}])
    write("tags/en", [{"text": "tagged"}])
    (tmp_path / "text.yaml").write_text(CONFIG)
    where = ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    return ["--config", str(tmp_path / "text.yaml"), *where]


def test_text_is_gathered_without_what_is_held_out_or_repeated(run_here, options, tmp_path):
    printed = run_here("prepare_text.py", *options)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {(row["language"], row["corpus"]): row for row in results["monolingual"]}
    assert rows["en", "bible"] == {
        **{"language": "en", "corpus": "bible", "lines": 15},
        **{"held_out": 2, "repeated": 1, "long": 1, "kept": 11},
    }
    assert rows["en", "topics"]["repeated"] == 1 and rows["en", "topics"]["kept"] == 1
    assert rows["de", "bible"]["held_out"] == 1 and rows["de", "bible"]["kept"] == 13
    assert rows.keys() == {("en", "bible"), ("en", "topics"), ("de", "bible")} and "held_out" in printed
    text = {
        name: (tmp_path / "out" / "monolingual" / name).read_text().splitlines()
        for name in ("train.en", "validation.en")
    }
    assert len(text["validation.en"]) == 2 and len(text["train.en"]) == 10
    expected = {*(f"verse {i}" for i in range(10)), "x" * 35, "a topic"}
    assert {*text["train.en"], *text["validation.en"]} == expected
    loaded = load_parallel(f"{tmp_path}/out/monolingual/train.{{lang}}", ["en-en", "de-de"])
    assert len(loaded["en-en"]) == 10 and len(loaded["de-de"]) == 11

    assert results["parallel"][0] == {"split": "train", "rows": 15, "incomplete": 1, "long": 2, "kept": 12}
    assert [row["kept"] for row in results["parallel"][1:]] == [3, 3]
    parallel = load_parallel(f"{tmp_path}/out/parallel/train.parquet", ["en-de"])["en-de"]
    assert len(parallel) == 12 and max(map(len, parallel["source"])) <= 30


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--corpora", '{"bible": {"file": "x"}}'], "expected lines `file:`, `text:`, `languages:`"),
        (["--corpora", '{"a": {"file": "b", "text": "c", "languages": ["en"], "splits": ["dev"]}}'], "splits among"),
        (
            ["--corpora", '{"a": {"file": "topics/en.parquet", "text": "words", "languages": ["en"]}}'],
            "no column 'words'",
        ),
        (
            ["--corpora", '{"a": {"file": "topics/en.parquet", "text": "text", "languages": ["en"]}}'],
            "the split 'validation'",
        ),
        (["--validation_lines", "50"], "'en' has 12 lines of training text, and 50"),
        (["--max_parallel_characters", "2"], "has no row with text of up to 2 characters"),
    ],
)
def test_bad_input_is_one_sentence(run_here, options, tmp_path, wrong, message):
    error = run_here("prepare_text.py", *options, *wrong, fails=True)
    assert error.splitlines()[-1].startswith("Error: ") and message in error
    assert not (tmp_path / "out").exists()
