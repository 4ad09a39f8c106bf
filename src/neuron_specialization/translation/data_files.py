"""Read the files that parallel text comes in: which ones a path names, and how each format is read."""

import csv
import glob
import gzip
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import datasets
from datasets import Dataset, Features, Value, concatenate_datasets, get_dataset_config_names, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..neurons.language_pairs import shorten
from .messages import in_one_line

# rows that have not all the same languages; the lowest version of datasets reads them as it reads others
_UNEVEN: Any = getattr(datasets, "Json", ())
_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
FORMATS = ", ".join(_READERS)
_BAR_FROM = 100_000_000  # bytes; less is read in seconds
_TSV_SAMPLE = 1_000_000  # bytes


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Let datasets show its progress bars, or not."""
    before = datasets.are_progress_bars_disabled()
    if not shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            datasets.enable_progress_bars()


def read_rows(path: str, quiet: bool = False) -> Dataset | None:
    """Read a file, a directory of shards or a pattern of shards; None if the path names none of these.

    A nested column "translation" is read as one column per language.

    Raises:
        ValueError: if there is no such file, several of different kinds, one without content, or one that is damaged.
    """
    files = _files(path)
    if files is None:
        return None
    for file in files:
        with _open(file) as opened:
            if not opened.read(1):
                raise ValueError(f"{file} is empty.")
    kind = _kind(files[0])
    options: dict[str, Any] = {}
    if _READERS[kind] == "csv":
        each = [_csv_options(file, kind) for file in files]
        options = each[0]
        if any(other != options for other in each):  # shards that were written with other quotes or line ends
            _check_columns(files, [of["features"] for of in each])
            return concatenate_datasets([read for file in files if (read := read_rows(str(file), quiet)) is not None])
    paths = [glob.escape(str(file)) for file in files]
    large = sum(file.stat().st_size for file in files) >= _BAR_FROM
    with progress_bars(large and not quiet), _readable(path):
        try:
            rows = load_dataset(_READERS[kind], data_files=paths, split="train", **options)
        except DatasetGenerationError:
            # columns and their types are taken from the first rows, where a language may be missing
            features = _features_of_all_rows(files) if _READERS[kind] == "json" else None
            if features is None:
                raise
            rows = load_dataset("json", data_files=paths, split="train", features=features)
    return flat(rows)


def _features_of_all_rows(files: Sequence[Path]) -> Features | None:
    """Return text as the type of every column that any row has, of nested languages too.

    None where the files are no JSON lines, or hold lists or what lies deeper.
    """
    features: dict[str, Any] = {}
    for file in files:
        with _open(file) as opened:
            for line in opened:
                try:
                    row = json.loads(line.decode("utf-8-sig")) if line.strip() else {}
                except ValueError:
                    return None
                if not isinstance(row, dict):
                    return None
                for name, value in row.items():
                    nested_too = value.values() if isinstance(value, dict) else [value]
                    if any(isinstance(each, list | dict) for each in nested_too):
                        return None
                    if isinstance(value, dict):
                        known = features.get(name)
                        nested = known if isinstance(known, dict) else {}
                        features[name] = nested | dict.fromkeys(value, Value("string"))
                    else:
                        features.setdefault(name, Value("string"))
    return Features(features)


def read_text(files: Mapping[str, str], quiet: bool = False) -> Dataset:
    """Read text files whose lines correspond, column → file; only a newline ends a line.

    Raises:
        ValueError: if a file is missing or not UTF-8, or one has more lines than another.
    """
    for file in files.values():
        if not Path(file).is_file():
            raise ValueError(f"There is no file {file}.")
    stats = [os.stat(file) for file in files.values()]
    # part of the cache's key, so that datasets sees that a file changed; a list would be taken for shards
    version = tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)
    features = Features({column: Value("string") for column in files})
    large = sum(stat.st_size for stat in stats) >= _BAR_FROM
    with progress_bars(large and not quiet), _readable(" and ".join(files.values())):
        return Dataset.from_generator(_lines, features=features, gen_kwargs={"files": dict(files), "version": version})


def read_from_hub(path: str, split: str | None = None) -> Dataset:
    """Read a dataset on the Hub, by its name or NAME:CONFIGURATION.

    Raises:
        ValueError: if there is none, or none with this configuration or split.
    """
    name, _, configuration = path.partition(":")
    try:
        return flat(load_dataset(name, configuration or None, split=split or "train"))
    except Exception as error:
        known = configurations(name)
        if len(known) > 1 and configuration not in known:
            listed = shorten(known, 20)
            raise ValueError(f"Name a configuration of {name}, such as {name}:{known[0]}; it has {listed}.") from error
        raise ValueError(
            f"Cannot load {path!r}: expected a file ending in {FORMATS} or the name of a dataset on the Hub "
            f"({type(error).__name__}: {in_one_line(error)})."
        ) from error


def configurations(name: str) -> list[str]:
    """Return the configurations of a dataset on the Hub; none if it cannot be reached."""
    try:
        return _configurations(name)
    except Exception:  # loading it, which is next, tells why
        return []


_configurations = cache(get_dataset_config_names)  # asked for each direction


def flat(rows: Dataset) -> Dataset:
    """Return rows with the languages of a nested column "translation", as on the Hub, as columns of their own."""
    nested = rows.features.get("translation")
    if isinstance(nested, _UNEVEN):
        return _of_uneven_rows(rows)
    if not isinstance(nested, dict | datasets.Translation):
        return rows
    languages = nested if isinstance(nested, dict) else nested.languages
    rows = rows.select_columns(["translation", *(["split"] if "split" in rows.column_names else [])])
    return rows.flatten().rename_columns({f"translation.{language}": language for language in languages})


def _of_uneven_rows(rows: Dataset) -> Dataset:
    """Return a column for each language that any row has; it is null where a row lacks it."""
    languages = sorted({code for nested in rows["translation"] for code in nested or {}})
    kept = [name for name in rows.column_names if name == "split"]
    features = Features({**{name: rows.features[name] for name in kept}, **dict.fromkeys(languages, Value("string"))})

    def spread(nested: dict[str, str] | None) -> dict[str, str | None]:
        return {code: (nested or {}).get(code) for code in languages}

    others = [name for name in rows.column_names if name not in kept]
    return rows.map(spread, input_columns="translation", remove_columns=others, features=features)


def _files(path: str) -> list[Path] | None:
    if Path(path).is_file():
        files = [Path(path)]
    elif Path(path).is_dir():
        files = sorted(f for f in Path(path).iterdir() if _kind(f) in _READERS and not f.name.startswith((".", "_")))
    elif any(sign in path for sign in "*?["):
        files = sorted(map(Path, glob.glob(path)))
    elif _kind(Path(path)) in _READERS or "{" in path or path.startswith((".", "/", "~")):
        files = []
    else:
        return None
    if not files:
        raise ValueError(f"There is no file {path}." if not Path(path).is_dir() else f"{path} holds no {FORMATS}.")
    if Path(path).is_dir():
        _check_shards(path, files)
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1 or not kinds <= set(_READERS):
        raise ValueError(
            f"Expected files of one kind ({FORMATS}; .gz too), got {', '.join(sorted(kinds))} in {path}. Plain text, "
            "a file per language, is named with {lang}: data/train.{lang}."
        )
    return files


def _check_shards(path: str, files: Sequence[Path]) -> None:
    """A directory's files are shards of one text if their names differ in numbers only."""
    names = {re.sub(r"\d+", "#", file.name): file.name for file in files}
    if len(names) > 1:
        raise ValueError(
            f"{path} holds different files: {', '.join(sorted(names.values()))}. Name one, or the shards of one text "
            "with a pattern: data/train-*.parquet."
        )


def _kind(file: Path) -> str:
    return Path(file.name.lower().removesuffix(".gz")).suffix


def _open(file: str | Path) -> BinaryIO:
    if str(file).lower().endswith(".gz"):
        return gzip.open(file)  # type: ignore[return-value]
    return open(file, "rb")


def _check_columns(files: Sequence[Path], columns: Sequence[Features]) -> None:
    for file, of_file in zip(files, columns, strict=True):
        if of_file != columns[0]:
            raise ValueError(
                f"Expected shards with the same columns, but {files[0]} has {', '.join(columns[0])}, and {file} has "
                f"{', '.join(of_file)}."
            )


def _csv_options(file: Path, kind: str) -> dict[str, Any]:
    """Return pandas' options: every column is text, an empty cell is missing, and quotes are text or not."""
    delimiter = "\t" if kind == ".tsv" else ","
    with _open(file) as opened:
        sample = opened.read(_TSV_SAMPLE)
    if not sample.partition(b"\n")[2].strip():
        raise ValueError(f"{file} holds a header, but no rows.")
    quoting: Any = csv.QUOTE_MINIMAL if kind == ".csv" or _is_quoted(sample) else csv.QUOTE_NONE
    header = sample.decode("utf-8-sig", errors="replace").partition("\n")[0].rstrip("\r")
    names = next(csv.reader([header], delimiter=delimiter, quoting=quoting))
    if len(names) == 1 and any(other in header for other in ",;\t"):
        separator = "tabs" if kind == ".tsv" else "commas"
        raise ValueError(f"{file} has a single column, {header!r}; expected {separator} between columns.")
    _check_width(file, sample, names, delimiter, quoting)
    features = Features({name: Value("string") for name in names})
    # cells beyond the header are never taken for row labels
    missing = {"keep_default_na": False, "na_values": [""], "index_col": False}
    if b"\r\n" in sample:
        _check_carriage_returns(file)
    # pandas would end a line at a carriage return inside a sentence, too
    ends = {} if b"\r\n" in sample else {"lineterminator": "\n"}
    return {"delimiter": delimiter, "quoting": quoting, "features": features, **missing, **ends}


def _check_width(file: Path, sample: bytes, names: Sequence[str], delimiter: str, quoting: Any) -> None:
    """Check that the first row has no more cells than the header: pandas would leave them out, here and below.

    In later rows it is pandas that refuses more cells.
    """
    lines = sample.decode("utf-8-sig", errors="replace").replace("\r", " ").split("\n")[1:]
    rows = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, quoting=quoting)
    try:
        first: list[str] = next((row for row in rows if "".join(row).strip()), [])
    except csv.Error:  # a long cell, or a quote that is never closed: pandas reads it, or says so
        return
    if any(cell.strip() for cell in first[len(names) :]):
        raise ValueError(
            f"{file} has {len(first)} cells in its first row, but {len(names)} columns in its header "
            f"({', '.join(names)}). Name every column, and quote text that holds the separator."
        )


def _check_carriage_returns(file: Path) -> None:
    """Refuse a file of CRLF lines with a carriage return inside one: pandas would end the line there."""
    with _open(file) as opened:
        for number, line in enumerate(opened, 1):
            if b"\r" in line[:-2] and b'"' not in line:
                raise ValueError(
                    f"{file} ends its lines with CRLF, and line {number} has a carriage return in a sentence. Convert "
                    "it to lines that end with LF (dos2unix), or remove the carriage return."
                )


def _is_quoted(sample: bytes) -> bool:
    """Return whether a TSV file is written like CSV: its header is quoted, or its quoted cells double their quotes.

    TSV has no quoting, and sentences begin with quotes of their own: `"No," he said.`
    """
    lines = sample.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if re.fullmatch(rb'"[^"]*"(\t"[^"]*")*\r?', lines[0]):
        return True
    cells = [cell.rstrip(b"\r") for line in lines[1:-1] or lines[1:] for cell in line.split(b"\t")]
    opened = [cell for cell in cells if cell.startswith(b'"')]
    return bool(opened) and all(re.fullmatch(rb'"([^"]|"")*""([^"]|"")*"', cell) for cell in opened)


def _lines(files: Mapping[str, str], version: tuple[Any, ...]) -> Iterator[dict[str, str]]:
    with ExitStack() as stack:
        opened = [stack.enter_context(_open(file)) for file in files.values()]
        for number, lines in enumerate(zip_longest(*opened), 1):
            if None in lines:
                short = [file for file, line in zip(files.values(), lines, strict=True) if line is None]
                raise ValueError(f"{short[0]} ends before line {number}, which the other file has")
            text = [line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n") for line in lines]
            yield dict(zip(files, text, strict=True))


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error  # datasets hides it behind "an error occurred"
        raise ValueError(f"Cannot read {path}: {in_one_line(cause)}") from error
