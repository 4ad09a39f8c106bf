"""The text of a run from scattered corpora: monolingual lines without what is tested on, and short parallel rows.

Every corpus is read in its splits. Its training text is kept, without lines that stand, in the same language, in the
held-out splits of any corpus, and without repetitions. Lines are compared by 64-bit hashes, without regard to case and
spacing.
"""

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from xxhash import xxh3_64_intdigest

from .arrow import arrow_batches
from .data import rows_of_split
from .data_files import progress_bars, read_rows
from .text_files import one_line

TRAIN = "train"
SPLITS = (TRAIN, "validation", "test")
_COUNTS = ("lines", "held_out", "repeated", "long", "kept")


@dataclass(frozen=True)
class Corpus:
    """Where text of several languages is; "{language}" and "{split}" stand for each.

    Attributes:
        file: a .parquet, .jsonl, .csv or .tsv file. If it has a column "split", only rows of the split are read.
        text: column of the text.
        languages: codes.
        splits: those that the corpus has. All but "train" are held out.
    """

    file: str
    text: str
    languages: list[str]
    splits: list[str] = field(default_factory=lambda: list(SPLITS))


def describe_corpora(described: Mapping[str, Any]) -> dict[str, Corpus]:
    """Return name → corpus, from fields as a configuration file gives them.

    Raises:
        ValueError: if a field is unknown or missing, or a split has another name than "train", "validation" or "test".
    """
    known = {each.name for each in dataclasses.fields(Corpus)}
    corpora = {}
    for name, fields in described.items():
        if not isinstance(fields, Mapping) or not {"file", "text", "languages"} <= fields.keys() <= known:
            raise ValueError(
                f"Corpus {name}: expected lines `file:`, `text:`, `languages:` and maybe `splits:`, got {fields!r}."
            )
        corpora[name] = Corpus(**fields)
        if not corpora[name].splits or not set(corpora[name].splits) <= set(SPLITS):
            raise ValueError(f"Corpus {name}: expected splits among {', '.join(SPLITS)}, got {fields['splits']!r}.")
    return corpora


def write_monolingual(
    corpora: Mapping[str, Corpus],
    languages: Sequence[str],
    source: str | Path,
    directory: str | Path,
    *,
    max_characters: int | None = None,
    validation_lines: int = 0,
) -> list[dict[str, Any]]:
    """Write train.{language} and validation.{language}, one text per line, which `load_parallel` reads.

    Args:
        corpora: name → corpus.
        languages: codes of the languages to write.
        source: directory that the corpora's paths start from.
        directory: where to write.
        max_characters: leave out longer lines.
        validation_lines: lines of the training text, drawn by their hash, that become the validation text.

    Returns:
        One row per language and corpus: lines of its training text, how many were left out because they are
        "held_out", "repeated" or "long", and how many were "kept".

    Raises:
        ValueError: if a file, column or split is missing, or a language has no more lines than the validation text.
    """
    report = []
    for language in languages:
        of_language = {name: corpus for name, corpus in corpora.items() if language in corpus.languages}
        seen = {_key(line) for corpus in of_language.values() for line in _lines(corpus, language, source, False)}
        held_out, lines = frozenset(seen), []
        for name, corpus in of_language.items():
            if TRAIN not in corpus.splits:
                continue
            counts = dict.fromkeys(_COUNTS, 0)
            for line in _lines(corpus, language, source, True):
                key = _key(line)
                long = max_characters is not None and len(line) > max_characters
                fault = "held_out" if key in held_out else "repeated" if key in seen else "long" if long else "kept"
                counts["lines"] += 1
                counts[fault] += 1
                seen.add(key)
                if fault == "kept":
                    lines.append((key, line))
            report.append({"language": language, "corpus": name, **counts})
        if len(lines) <= validation_lines:
            raise ValueError(
                f"{language!r} has {len(lines)} lines of training text, and {validation_lines} were to be set aside "
                "for validation. Name corpora that have the language, or lower --validation_lines."
            )
        last = sorted(key for key, _ in lines)[validation_lines - 1] if validation_lines else -1
        for name, chosen in (("validation", True), (TRAIN, False)):
            text = "".join(f"{line}\n" for key, line in lines if (key <= last) == chosen)
            (Path(directory) / f"{name}.{language}").write_text(text, encoding="utf-8")
    return report


def write_parallel(
    file: str,
    languages: Sequence[str],
    directory: str | Path,
    *,
    max_characters: int | None = None,
    max_held_out: int | None = None,
) -> list[dict[str, Any]]:
    """Write train, validation and test.parquet with the rows of a file that are short in every language.

    Args:
        file: path with one column per language; "{split}" stands for the split.
        languages: columns. Rows where one is empty are left out.
        directory: where to write.
        max_characters: leave out rows of which any text is longer.
        max_held_out: take at most this many rows of validation and of test, drawn at random, the same in every call.

    Returns:
        One row per split: "rows", and how many were "incomplete", "long" and "kept".

    Raises:
        ValueError: if a file or a column is missing, or no row is left.
    """
    report = []
    for split in SPLITS:
        place = file.replace("{split}", split)
        rows = _read(place, split, languages)
        lengths = np.concatenate([_lengths(batch) for batch in arrow_batches(rows, list(languages))])
        incomplete = (lengths == 0).any(1)
        long = ~incomplete & (lengths.max(1) > (max_characters or lengths.max()))
        kept = np.flatnonzero(~incomplete & ~long).tolist()
        if split != TRAIN and max_held_out is not None and max_held_out < len(kept):
            kept = sorted(random.Random(0).sample(kept, max_held_out))
        if not kept:
            raise ValueError(f"{place} has no row with text of up to {max_characters} characters in every language.")
        with progress_bars(False):
            rows.select(kept).to_parquet(Path(directory) / f"{split}.parquet")
        counts = {"rows": len(rows), "incomplete": int(incomplete.sum()), "long": int(long.sum()), "kept": len(kept)}
        report.append({"split": split, **counts})
    return report


def _lengths(batch: pa.RecordBatch) -> np.ndarray:
    """Return the characters in every cell, int64 [rows, columns]; 0 where there is no text."""
    columns = [pc.fill_null(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0) for column in batch.columns]
    return np.stack([column.to_numpy(zero_copy_only=False) for column in columns], 1).astype(np.int64)


def _lines(corpus: Corpus, language: str, source: str | Path, train: bool) -> Iterator[str]:
    """Yield the text of the training split, or of all others; each a line that is not empty."""
    column = corpus.text.replace("{language}", language)
    for split in corpus.splits:
        if (split == TRAIN) == train:
            file = corpus.file.replace("{language}", language).replace("{split}", split)
            for batch in arrow_batches(_read(f"{source}/{file}", split, [column]), [column]):
                for text in batch.column(0).to_pylist():
                    if text and (line := " ".join(one_line(text).split())):
                        yield line


def _read(place: str, split: str, columns: Sequence[str]) -> Dataset:
    rows = read_rows(place, True)
    missing = [column for column in columns if rows is None or column not in rows.column_names]
    if rows is None or missing:
        known = ", ".join(rows.column_names) if rows is not None else "nothing that can be read"
        raise ValueError(f"{place} has no column {missing[0]!r}; it has {known}.")
    return rows_of_split(rows, split, place)


def _key(line: str) -> int:
    return xxh3_64_intdigest(line.casefold().encode())
