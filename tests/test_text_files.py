"""Text files, line by line: what a line is, and what an interruption leaves."""

import json

import pytest

import neuron_specialization as ns
from neuron_specialization.translation import text_files
from neuron_specialization.translation.text_files import LineWriter, one_line, read_lines, translate_lines


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"a\nb\n", ["a", "b"]),
        (b"a\nb", ["a", "b"]),
        (b"a\r\n\r\nb\r\n", ["a", "", "b"]),
        ("a\u2028b\x0cc\x85d\x1ee\rf\n\n".encode(), ["a\u2028b\x0cc\x85d\x1ee\rf", ""]),
        ("\ufeffa\n".encode(), ["a"]),
        (b"", []),
        (b"\n", [""]),
    ],
)
def test_only_newlines_end_lines(tmp_path, data, lines):
    (tmp_path / "text").write_bytes(data)
    assert read_lines(str(tmp_path / "text")) == lines


def test_other_encodings_are_refused_with_their_line(tmp_path):
    (tmp_path / "text").write_bytes("a\nb\nä\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8 text: line 3 holds the byte 0xe4"):
        read_lines(str(tmp_path / "text"))


def test_a_translation_is_one_line_to_every_reader():
    assert one_line("a\nb\u2028c\x85d\r") == "a b c d" and one_line("") == ""


def test_lines_are_translated_in_order_and_blank_ones_stay_blank(toy, toy_model, toy_tokenizer, monkeypatch):
    monkeypatch.setattr(text_files, "_BATCHES_PER_CHUNK", 2)
    lines = [*toy.sentences(5, "test")["Pv"], "", " \t", "ba\u2028bu", *toy.sentences(3, "train")["Pv"]]
    options = {"batch_size": 2, "max_new_tokens": 6}
    chunks = list(translate_lines(toy_model, toy_tokenizer, lines, "Pv-Aa", **options))
    assert [len(chunk) for chunk in chunks] == [4, 4, 3], "written as it goes"
    found = [line for chunk in chunks for line in chunk]
    assert found[5:7] == ["", ""] and all("\n" not in line for line in found)
    texts = [line for line in lines if line.strip()]
    expected = ns.translate(toy_model, toy_tokenizer, texts, "Pv-Aa", **options)
    assert [line for i, line in enumerate(found) if i not in (5, 6)] == [one_line(text) for text in expected]
    (rest, *_) = translate_lines(toy_model, toy_tokenizer, lines, "Pv-Aa", done=3, **options)
    assert rest == found[3:7]
    with pytest.raises(ValueError, match="^Sentence 9 of Pv-Aa, "):
        list(translate_lines(toy_model, toy_tokenizer, [*lines[:8], "babu " * 99], "Pv-Aa", done=3, **options))


def test_an_interrupted_file_is_continued_by_the_same_work_only(tmp_path, capsys):
    path = tmp_path / "new" / "out.txt"
    made_of = {"pair": "en-de", "num_beams": 5}
    first = LineWriter(str(path), made_of)
    assert first.done == 0
    first.write(["one", "", "three"])
    partial = path.with_name("out.txt.partial")
    with partial.open("ab") as file:
        file.write("cut öff".encode()[:-1])
    assert not path.exists()
    with pytest.raises(ValueError, match="started with num_beams=5, but this run has 4"):
        LineWriter(str(path), {**made_of, "num_beams": 4})
    assert "cut" in partial.read_text(errors="replace"), "a refusal changes nothing"
    with pytest.raises(KeyboardInterrupt), LineWriter(str(path), made_of) as second:
        assert second.done == 3 and "holds 3 lines" in capsys.readouterr().err
        second.write(["four"])
        raise KeyboardInterrupt
    with LineWriter(str(path), made_of) as third:
        assert third.done == 4
    assert path.read_text() == "one\n\nthree\nfour\n" and [p.name for p in path.parent.iterdir()] == ["out.txt"]
    with pytest.raises(ValueError, match="exists already"):
        LineWriter(str(path), made_of)


def test_a_partial_file_without_lines_binds_nobody(tmp_path):
    LineWriter(str(tmp_path / "out"), {"pair": "en-ed"})
    with LineWriter(str(tmp_path / "out"), {"pair": "en-de"}):
        pass
    assert (tmp_path / "out").read_text() == ""


def test_an_error_before_the_first_line_leaves_nothing(tmp_path):
    for path in ("out", "new/er/out"):
        with pytest.raises(ValueError, match="no such pair"), LineWriter(str(tmp_path / path), {"pair": "en-xx"}):
            raise ValueError("no such pair")
        assert not list(tmp_path.iterdir())
    for path in (".", str(tmp_path), f"{tmp_path}/"):
        with pytest.raises(ValueError, match="exists already"):
            LineWriter(path, {})


def test_a_partial_file_of_unknown_origin_is_left_alone(tmp_path):
    (tmp_path / "out.partial").write_text("mine\n")
    for about in (None, "not JSON", json.dumps({"pair": "de-en"})):
        if about is not None:
            (tmp_path / "out.partial.json").write_text(about)
        with pytest.raises(ValueError, match="out.partial"):
            LineWriter(str(tmp_path / "out"), {"pair": "en-de"})
        assert (tmp_path / "out.partial").read_text() == "mine\n"
