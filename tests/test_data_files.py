"""The formats that parallel text comes in, and which files a path names."""

import csv
import gzip
import json

import pandas
import pytest
from datasets import Dataset, Features, Translation

from neuron_specialization.translation.data import load_parallel

ROWS = {
    "en": ["a cat", "two dogs", None, 'he said "no"'],
    "de": ["eine Katze", "zwei Hunde", "drei", "er sagte nein"],
    "fr": ["un chat", None, "trois", "il a dit non"],
}
FORMATS = ["parquet", "jsonl", "tsv", "csv", "jsonl.gz", "csv.gz", "quoted.tsv", "all-quoted.tsv.gz"]


def lines_of(data, pair) -> list[tuple[str, str]]:
    return list(zip(data[pair]["source"], data[pair]["target"], strict=True))


@pytest.fixture(params=FORMATS)
def parallel_file(request, tmp_path):
    path = tmp_path / f"text.{request.param}"
    frame = pandas.DataFrame(ROWS)
    if request.param == "parquet":
        frame.to_parquet(path)
    elif request.param.startswith("jsonl"):
        frame.to_json(path, orient="records", lines=True)
    elif request.param == "tsv":
        lines = [list(ROWS), *zip(*ROWS.values(), strict=True)]
        path.write_text("".join("\t".join("" if v is None else v for v in line) + "\n" for line in lines))
    else:
        separator = "," if "csv" in request.param else "\t"
        quoting = csv.QUOTE_ALL if "all" in request.param else csv.QUOTE_MINIMAL
        frame.to_csv(path, sep=separator, quoting=quoting, index=False)
    return path


def test_every_format_gives_every_direction_without_missing_sides(parallel_file):
    data = load_parallel(parallel_file, ["en-de", "de-fr"])
    expected = [("a cat", "eine Katze"), ("two dogs", "zwei Hunde"), ('he said "no"', "er sagte nein")]
    assert lines_of(data, "en-de") == expected
    assert lines_of(data, "de-fr") == [("eine Katze", "un chat"), ("drei", "trois"), ("er sagte nein", "il a dit non")]


def test_quotes_in_plain_tsv_are_text(tmp_path):
    rows = ['"No," he said.\t"Nein", sagte er.', '"\tein "" Zoll', '"all"\t"alles"', "NA\tnull"]
    (tmp_path / "text.tsv").write_text("\n".join(["en\tde", *rows]) + "\n")
    data = load_parallel(str(tmp_path / "text.tsv"), ["en-de"])
    assert lines_of(data, "en-de") == [tuple(row.split("\t")) for row in rows]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("kind", ["tsv", "csv", "quoted.csv", "csv.gz"])
def test_a_carriage_return_in_a_sentence_ends_no_line(tmp_path, kind, end):
    rows = [["en", "de"], ["a\rb", "c"], ["d", "e\rf"], ["g", ""], ["h", "i"]]
    separator, quote = ("\t" if kind == "tsv" else ","), ('"' if "quoted" in kind else "")
    text = "".join(separator.join(f"{quote}{cell}{quote}" for cell in row) + end for row in rows)
    with (gzip.open if kind.endswith("gz") else open)(tmp_path / f"text.{kind}", "wb") as file:
        file.write(text.encode())
    if end == "\r\n" and not quote:  # where it would end one
        with pytest.raises(ValueError, match="ends its lines with CRLF, and line 2 has a carriage return in a sent"):
            load_parallel(tmp_path / f"text.{kind}", ["en-de"])
    else:
        expected = [("a\rb", "c"), ("d", "e\rf"), ("h", "i")]
        assert lines_of(load_parallel(tmp_path / f"text.{kind}", ["en-de"]), "en-de") == expected


def test_lines_that_end_in_crlf_are_read_as_others_are(tmp_path):
    """Shards with their own order of columns, rows that leave out the last cell, and empty lines."""
    (tmp_path / "t-0.csv").write_bytes(b"en,de,note\r\na,b\r\n\r\nc,d,x\r\n")
    (tmp_path / "t-1.csv").write_bytes(b"de,en,note\r\nf,e,\r\n")
    expected = [("a", "b"), ("c", "d"), ("e", "f")]
    assert lines_of(load_parallel(tmp_path, ["en-de"]), "en-de") == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "en,de,fr\nHello,Hallo,Bonjour,1\nYes,Ja,Oui,2\n"),
        ("a.tsv", "en\tde\nGo.\tGeh.\tCC-BY\nRun.\tLauf.\tCC-BY\n"),
        ("a.csv", "en,de\nHello, you,Hallo\nYes,Ja\nNo,Nein\n"),
        ("a.csv", "en,de\n\nHello, you,Hallo\nYes,Ja\nNo,Nein\n"),
        ("a.csv", "en,de\nYes,Ja\nHello, you,Hallo\nNo,Nein\n"),
    ],
)
def test_more_cells_than_columns_are_refused(tmp_path, name, text):
    """pandas takes the first column for row labels then, and German stands where English was."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"[34] cells in its first row, but [23] columns|Expected 2 fields in line 3"):
        load_parallel(tmp_path / name, ["en-de"])


def test_more_cells_than_columns_are_refused_in_every_shard(tmp_path):
    for number, text in enumerate(("en,de\na,b\n", "en,de\nc,d,x\n")):
        (tmp_path / f"t-{number}.csv").write_text(text)
    with pytest.raises(ValueError, match="t-1.csv has 3 cells in its first row, but 2 columns"):
        load_parallel(tmp_path, ["en-de"])


def test_a_long_first_cell_is_read(tmp_path):
    (tmp_path / "a.csv").write_text(f"en,de\n{'a' * 200_000},b\n")
    assert [len(side) for side in lines_of(load_parallel(tmp_path / "a.csv", ["en-de"]), "en-de")[0]] == [200_000, 1]


def test_separators_at_the_ends_of_lines_add_no_column(tmp_path):
    (tmp_path / "a.tsv").write_text("en\tde\na\tb\t\nc\td\t\n")
    assert lines_of(load_parallel(tmp_path / "a.tsv", ["en-de"]), "en-de") == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_plain_text_has_a_file_per_language(tmp_path, packed):
    def write(name: str, lines: list[str]) -> None:
        opened = gzip.open if packed else open
        with opened(tmp_path / f"{name}{packed}", "wb") as file:
            file.write("".join(f"{line}\n" for line in lines).encode())

    english, german = ["one", "a\u2028b\x85c\x0c\rd", "", "four"], ["eins", "zwei", "drei", "vier\r"]
    write("train.en", english)
    write("train.de", german)
    path = tmp_path / f"train.{{lang}}{packed}"
    data = load_parallel(path, ["en-de", "de-en"])
    assert lines_of(data, "en-de") == list(zip(english, [*german[:3], "vier"], strict=True))
    assert data["de-en"]["source"][:] == data["en-de"]["target"][:]
    write("train.de", german[:3])
    with pytest.raises(ValueError, match="train.de.* ends before line 4, which the other file has"):
        load_parallel(path, ["en-de"])
    with pytest.raises(ValueError, match="no file .*train.fr"):
        load_parallel(path, ["en-fr"])
    with pytest.raises(ValueError, match=r"Plain text, a file per language, is named with \{lang\}"):
        load_parallel(tmp_path / f"train.en{packed}", ["en-de"])


@pytest.mark.parametrize("features", [None, Features({"translation": Translation(["en", "de"])})])
def test_languages_may_be_nested_as_on_the_hub(tmp_path, features):
    rows = {"translation": [{"en": "a", "de": "b"}, {"en": "c", "de": None}]}
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "x.parquet")
    assert lines_of(load_parallel(tmp_path / "x.parquet", ["de-en"]), "de-en") == [("b", "a")]
    for second in ("", '{"translation": {"en": "c"}}\n', '{"translation": null}\n'):  # whose sides are missing
        (tmp_path / "x.jsonl").write_text('{"translation": {"en": "a", "de": "b"}}\n' + second)
        assert lines_of(load_parallel(tmp_path / "x.jsonl", ["de-en"]), "de-en") == [("b", "a")]


@pytest.mark.parametrize("early", [{}, {"sa": None}])
@pytest.mark.parametrize("nested", [False, True])
def test_a_language_may_occur_late_in_json_lines(tmp_path, early, nested):
    """datasets takes columns and their types from the first 10 MB."""
    rows = [{"en": "x" * 1000, **early}] * 12_000 + [{"en": "a", "sa": "b"}]
    lines = (json.dumps({"translation": row} if nested else row) for row in rows)
    (tmp_path / "x.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert lines_of(load_parallel(tmp_path / "x.jsonl", ["en-sa"]), "en-sa") == [("a", "b")]


def test_lists_beside_text_do_not_hide_what_is_wrong_with_json_lines(tmp_path):
    rows = [{"en": "x" * 1000, "scores": [1]}] * 12_000 + [{"en": "a", "sa": "b", "scores": [1]}]
    (tmp_path / "x.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(ValueError, match="column names don't match"):
        load_parallel(tmp_path / "x.jsonl", ["en-sa"])


def test_a_dataset_on_the_hub_is_named_with_its_configuration(tmp_path, monkeypatch):
    """datasets reads a folder as it reads a repository; one at the Hub cannot be reached from here."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("de-en", "a"), ("en-fr", "c")):
        (tmp_path / "some" / "corpus" / name).mkdir(parents=True)
        codes = name.split("-")
        row = {"translation": {code: f"{text} {code}" for code in codes}}
        (tmp_path / "some" / "corpus" / name / "train.jsonl").write_text(json.dumps(row) + "\n")
    listed = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("de-en", "en-fr"))
    (tmp_path / "some" / "corpus" / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
    data = load_parallel("some/corpus:de-en", ["de-en"])
    assert lines_of(data, "de-en") == [("a de", "a en")]
    data = load_parallel("some/corpus:{pair}", ["en-de", "en-fr", "fr-en"])
    assert [lines_of(data, pair) for pair in data] == [[("a en", "a de")], [("c en", "c fr")], [("c fr", "c en")]]
    for wrong in ("some/corpus:en-xx", "some/corpus:{pair}"):
        with pytest.raises(ValueError, match="^Name a configuration .* such as .*:de-en; it has de-en, en-fr"):
            load_parallel(wrong, ["de-fr"])
    with pytest.raises(ValueError, match="Cannot load 'some/corpus:de-en': .*Unknown split .test"):
        load_parallel("some/corpus:de-en", ["de-en"], split="test")


def test_shards_that_were_written_unlike_are_read_each_in_its_way(tmp_path):
    (tmp_path / "train-0.tsv").write_bytes(b'"en"\t"de"\n"a ""q"" b"\t"c\td"\n')
    (tmp_path / "train-1.tsv").write_bytes(b'en\tde\n"Yes\tja\nNo"\tnein\n')
    (tmp_path / "train-2.tsv").write_bytes(b"en\tde\r\ne\tf\r\n")
    (tmp_path / "train-3.tsv").write_bytes(b"en\tde\ng\rh\ti\n")
    expected = [('a "q" b', "c\td"), ('"Yes', "ja"), ('No"', "nein"), ("e", "f"), ("g\rh", "i")]
    assert lines_of(load_parallel(tmp_path / "train-*.tsv", ["en-de"]), "en-de") == expected
    (tmp_path / "train-4.tsv").write_bytes(b"en\tfr\nj\tk\n")
    with pytest.raises(ValueError, match="same columns, but .*train-0.tsv has en, de, and .*train-4.tsv has en, fr"):
        load_parallel(tmp_path / "train-*.tsv", ["en-de"])


def test_shards_are_read_as_one_and_files_are_never_mixed(tmp_path):
    for name, text in (("train-00000-of-00002", "a"), ("train-00001-of-00002", "b"), ("[dev]", "c")):
        pandas.DataFrame({"en": [text], "de": [text]}).to_parquet(tmp_path / f"{name}.parquet")
    expected = [("a", "a"), ("b", "b")]
    assert lines_of(load_parallel(tmp_path / "train-*.parquet", ["en-de"]), "en-de") == expected
    assert lines_of(load_parallel(tmp_path / "[dev].parquet", ["en-de"]), "en-de") == [("c", "c")]
    with pytest.raises(ValueError, match=r"different files: \[dev\].parquet, train-00001-of-00002.parquet. Name one"):
        load_parallel(tmp_path, ["en-de"])
    (tmp_path / "[dev].parquet").unlink()
    (tmp_path / "README.md").write_text("about")
    assert lines_of(load_parallel(f"{tmp_path}/", ["en-de"]), "en-de") == expected
    (tmp_path / "train-2.jsonl").write_text('{"en": "d", "de": "d"}\n')
    with pytest.raises(ValueError, match="of one kind .* got .jsonl, .parquet"):
        load_parallel(tmp_path / "train-*", ["en-de"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no .parquet"):
        load_parallel(tmp_path / "empty", ["en-de"])
    with pytest.raises(ValueError, match="no file .*test-"):
        load_parallel(tmp_path / "test-*.parquet", ["en-de"])


@pytest.mark.parametrize("name", ["x.tsv", "x.csv", "x.jsonl", "x.parquet", "x.jsonl.gz"])
def test_files_without_content_are_refused_in_one_sentence(tmp_path, name):
    with gzip.open(tmp_path / name, "wb") if name.endswith("gz") else open(tmp_path / name, "wb"):
        pass
    with pytest.raises(ValueError, match=f"{name} is empty"):
        load_parallel(tmp_path / name, ["en-de"])


def test_files_without_sentence_pairs_or_cut_off_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "x.tsv").write_text("en\tde\n")
    with pytest.raises(ValueError, match="x.tsv holds a header, but no rows"):
        load_parallel(tmp_path / "x.tsv", ["en-de"])
    (tmp_path / "x.jsonl").write_text('{"en": "a", "de"')
    with pytest.raises(ValueError, match="^Cannot read .*x.jsonl: JSON parse error"):
        load_parallel(tmp_path / "x.jsonl", ["en-de"])


@pytest.mark.parametrize(
    ("name", "text"), [("x.csv", "en;de\na;b\n"), ("x.csv", "en\tde\na\tb\n"), ("x.tsv", "en,de\na,b\n")]
)
def test_another_separator_than_that_of_the_format_is_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    expected = "commas" if name == "x.csv" else "tabs"
    with pytest.raises(ValueError, match=f"{name} has a single column, .*; expected {expected} between columns"):
        load_parallel(tmp_path / name, ["en-de"])
