"""Parallel text: load any number of directions."""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm

from ..neurons.language_pairs import check_pairs, split_pair
from .arrow import arrow_batches
from .data_files import configurations, read_from_hub, read_rows, read_text

_FEWEST_PARALLEL = 20


def load_parallel(
    path: str | os.PathLike[str],
    language_pairs: Iterable[str],
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_sentences: int | Mapping[str, int] | None = None,
    max_characters: int | None = None,
    document_column: str | None = None,
) -> dict[str, Dataset]:
    """Load parallel text with one column, or one file, per language.

    What is read stays on disk, memory-mapped; in memory are 8 bytes per sentence pair of directions that leave rows
    out.

    Args:
        path: one of these, where "{pair}" stands for each pair, or for the reversed pair if only that exists:

            - a .parquet, .jsonl, .csv or .tsv file with a header, the last three also compressed (.gz). Quotes in TSV
              are text, unless its header is quoted or the quoted cells of its first megabyte double
              their quotes, as CSV writers do;
            - shards of one text: a pattern (data/train-*.parquet), or a directory of files whose names differ in
              numbers only;
            - plain text with "{lang}" for each language: data/train.{lang} has the lines of data/train.en and
              data/train.de;
            - the name of a dataset on the Hub; where it has several configurations, NAME:CONFIGURATION, such as
              Helsinki-NLP/opus-100:{pair}.

            Columns may be nested in a column "translation".
        language_pairs: directions to load, such as ["en-de", "de-en"]; "de-de" has German text on both sides.
        split: rows to take where the file has a column "split", or the split of a dataset on the Hub.
        columns: language code → name of its column or file, where they differ.
        max_sentences: take at most this many sentence pairs per direction, or pair → how many, from the top.
        max_characters: leave out sentence pairs of which either side is longer than this, before they are counted.
        document_column: column that names a row's document and its place there, such as "GEN 1:1" in document "GEN 1".
            Sentence pairs are then limited to whole documents, one at least, picked in an order that depends on their
            names alone; so the documents of a smaller limit are among those of a larger one.

    Returns:
        pair → Dataset with columns "source" and "target". Rows where either side is missing (null, or an empty cell of
        CSV and TSV) are left out.

    Raises:
        ValueError: if a file, split or column is missing, or a direction has no sentence pair.
    """
    path = os.fspath(path)
    loaded: dict[str, Dataset] = {}
    files: dict[str | tuple[str, ...], Dataset] = {}
    pairs = check_pairs(language_pairs)
    for pair in tqdm(pairs, desc="loading", delay=2, leave=False):
        names = [(columns or {}).get(code, code) for code in split_pair(pair)]
        file = _file_for(path, pair, names)
        key = (file, *sorted(names)) if "{lang}" in file else file
        if key not in files:
            files[key] = _read(file, split, names, quiet="{" in path)
        limit = max_sentences.get(pair) if isinstance(max_sentences, Mapping) else max_sentences
        loaded[pair] = _direction(files[key], pair, file, names, limit, max_characters, document_column)
    if not loaded:
        raise ValueError("Expected at least one language pair to load, such as --language_pairs en-de de-en.")
    return loaded


def load_multiparallel(
    path: str | os.PathLike[str],
    languages: Sequence[str],
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_sentences: int | None = None,
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Load sentences that are translations of each other in several languages.

    Rows where a language has no text are left out, and rows that repeat an earlier row's sentence in some language:
    such a sentence has several translations.

    Args:
        path: a file with one column per language, shards, or plain text with "{lang}" (see `load_parallel`).
        languages: codes, at least two.
        split: see `load_parallel`.
        columns: see `load_parallel`.
        max_sentences: read from the top until there are so many.

    Returns:
        code → sentences, and the numbers of "rows" read, "incomplete", "repeated" and "kept".

    Raises:
        ValueError: if a file or column is missing, or fewer than 20 rows are left.
    """
    names = [(columns or {}).get(code, code) for code in languages]
    if len(set(names)) < max(2, len(names)):
        raise ValueError(f"Expected at least two languages, each named once, got {', '.join(names) or 'none'}.")
    rows = _read(os.fspath(path), split, names, quiet=True)
    _check_text(rows, names, os.fspath(path), "these languages")
    found: list[tuple[str, ...]] = []
    seen: list[set[str]] = [set() for _ in names]
    counts = Counter(rows=0, incomplete=0, repeated=0)
    batches = ([column.to_pylist() for column in batch.columns] for batch in arrow_batches(rows, names))
    for texts in chain.from_iterable(zip(*columns_of, strict=True) for columns_of in batches):
        if len(found) == max_sentences:
            break
        counts["rows"] += 1
        if not all(text and text.strip() for text in texts):
            counts["incomplete"] += 1
        elif any(text in before for text, before in zip(texts, seen, strict=True)):
            counts["repeated"] += 1
        else:
            found.append(texts)
            for text, before in zip(texts, seen, strict=True):
                before.add(text)
    if len(found) < _FEWEST_PARALLEL:
        raise ValueError(
            f"{path} has {len(found)} rows with text of their own in every one of {', '.join(names)}, of "
            f"{counts['rows']}; expected at least {_FEWEST_PARALLEL}. Leave out languages that lack most of it."
        )
    return dict(zip(languages, map(list, zip(*found, strict=True)), strict=True)), {**counts, "kept": len(found)}


def _file_for(path: str, pair: str, names: list[str]) -> str:
    """Return the path, or NAME:CONFIGURATION, with "{pair}" filled in, and "{lang}" kept."""
    straight, reverse = ("-".join(codes) for codes in (split_pair(pair), reversed(split_pair(pair))))
    name, _, configuration = path.partition(":")  # of a dataset on the Hub
    for codes in (straight, reverse):
        files = [path.replace("{pair}", codes).replace("{lang}", name) for name in names]
        if all(os.path.exists(file) or glob.glob(file) for file in files):
            return path.replace("{pair}", codes)
        if "{pair}" in configuration and configuration.replace("{pair}", codes) in configurations(name):
            return path.replace("{pair}", codes)
    return path.replace("{pair}", straight)


def _read(path: str, split: str | None, names: list[str], quiet: bool) -> Dataset:
    if "{lang}" in path:
        return read_text({name: path.replace("{lang}", name) for name in names}, quiet)
    rows = read_rows(path, quiet)
    return read_from_hub(path, split) if rows is None else rows_of_split(rows, split, path)


def rows_of_split(rows: Dataset, split: str | None, path: str) -> Dataset:
    """Return the rows of a split, or all rows if there is no column "split" or no split is asked for.

    Raises:
        ValueError: if there are none, naming the splits that `path`, where the rows come from, holds.
    """
    if split is None or "split" not in rows.column_names:
        return rows
    chosen = _where(rows, ["split"], lambda value: pc.fill_null(pc.equal(value, split), False))
    if not len(chosen):
        counts: Counter = Counter()
        for batch in arrow_batches(rows, ["split"]):
            counts.update({entry["values"]: entry["counts"] for entry in batch.column(0).value_counts().to_pylist()})
        values = ", ".join(f"{value!r} ({count} rows)" for value, count in counts.most_common(8))
        raise ValueError(
            f"{path} has no rows of the split {split!r}: its column 'split' holds {values or 'nothing'}. Choose one "
            f"of these with split=, or on the command line with --splits {split}=..."
        )
    return chosen


def _direction(
    rows: Dataset,
    pair: str,
    path: str,
    names: list[str],
    limit: int | None,
    max_characters: int | None,
    document_column: str | None,
) -> Dataset:
    by_document = [document_column] if limit is not None and document_column is not None else []
    _check_text(rows, [*names, *by_document], path, pair)
    if names[0] == names[1]:  # of a language with itself
        sides = [rows.select_columns(names[:1]).rename_column(names[0], side) for side in ("source", "target")]
        chosen = concatenate_datasets([*sides, *(rows.select_columns(name) for name in by_document)], axis=1)
    else:
        chosen = rows.select_columns([*names, *by_document])
        chosen = chosen.rename_columns(dict(zip(names, ("source", "target"), strict=True)))
    chosen = _where(chosen, ["source", "target"], lambda *sides: pc.and_(*map(pc.is_valid, sides)))
    if max_characters is not None:
        chosen = _where(
            *(chosen, ["source", "target"]),
            lambda *sides: pc.and_(*(pc.less_equal(pc.utf8_length(side), max_characters) for side in sides)),
        )
    if by_document:
        documents = [str(place).rpartition(":")[0] for place in chosen[by_document[0]]]
        chosen = chosen.select(_whole_documents(documents, limit or 0)).select_columns(["source", "target"])
    elif limit is not None:
        chosen = chosen.select(range(min(limit, len(chosen))))
    if not len(chosen):
        length = "" if max_characters is None else f" of at most {max_characters} characters"
        raise ValueError(f"{path} has no sentence pair for {pair}: no row has text{length} on both sides.")
    return chosen


def _whole_documents(documents: list[str], limit: int) -> list[int]:
    """Return the rows of the first documents, in the order of their names' digests, that stay within a limit."""
    sizes = Counter(documents)
    taken: set[str] = set()
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if taken and sizes[name] > limit:
            break
        taken.add(name)
        limit -= sizes[name]
    return [i for i, name in enumerate(documents) if name in taken]


def _where(rows: Dataset, columns: list[str], condition: Callable[..., pa.BooleanArray]) -> Dataset:
    """Return the rows for which an Arrow expression over columns holds; the same rows if it always does."""
    batches = (condition(*batch.columns) for batch in arrow_batches(rows, columns))
    kept = np.concatenate([np.empty(0, bool), *(batch.to_numpy(zero_copy_only=False) for batch in batches)])
    return rows if kept.all() else rows.select(np.flatnonzero(kept))


def _check_text(rows: Dataset, names: Sequence[str], path: str, what: str) -> None:
    missing = [name for name in names if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"{path} has no column {' and no column '.join(map(repr, missing))} for {what}; it has "
            f"{', '.join(rows.column_names)}. Map language codes to columns, "
            "for example columns={'de': 'german'}, on the command line --columns de=german."
        )
    for name in names:
        kind = getattr(rows.features[name], "dtype", type(rows.features[name]).__name__)
        if kind not in ("string", "large_string", "null"):
            raise ValueError(f"Column {name!r} of {path} holds {kind}, expected text (string).")
