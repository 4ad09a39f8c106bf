"""Parallel text: load any number of directions, check them, encode them."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset

from ..neurons.language_pairs import check_pairs, split_pair
from .tokenization import encode

_READERS = {
    ".parquet": ("parquet", {}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".tsv": ("csv", {"delimiter": "\t", "quoting": 3, "keep_default_na": False}),  # 3: quotes are text
}
MAX_LENGTH_RATIO = 3.0
_LENGTH_SLACK = 20  # characters; short sentences differ by more than their ratio says


def load_parallel(
    path: str,
    language_pairs: Iterable[str],
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_sentences: int | None = None,
) -> dict[str, Dataset]:
    """Load parallel text with one column per language.

    Args:
        path: a .parquet, .jsonl or .tsv file with a header, or the name of a dataset on the Hub. "{pair}" in it stands
            for each pair, or for the reversed pair where only that file exists.
        language_pairs: directions to load, such as ["en-de", "de-en"].
        split: rows to take where the file has a column "split", or the split of a dataset on the Hub.
        columns: language code → name of its column, where they differ.
        max_sentences: take at most so many sentence pairs per direction, from the top.

    Returns:
        pair → Dataset with columns "source" and "target". Rows where either side is missing (null) are left out.

    Raises:
        ValueError: if a file or column is missing, or a direction has no sentence pair.
    """
    loaded: dict[str, Dataset] = {}
    files: dict[str, Dataset] = {}
    for pair in check_pairs(language_pairs):
        file = _file_for(path, pair)
        if file not in files:
            files[file] = _read(file, split)
        loaded[pair] = _direction(files[file], pair, file, columns or {}, max_sentences)
    if not loaded:
        raise ValueError("Expected at least one language pair to load, such as --language_pairs en-de de-en.")
    return loaded


def _file_for(path: str, pair: str) -> str:
    named = path.replace("{pair}", pair)
    if named != path and not Path(named).exists():
        return path.replace("{pair}", "-".join(reversed(split_pair(pair))))
    return named


def _read(path: str, split: str | None) -> Dataset:
    suffix = Path(path).suffix
    if suffix in _READERS:
        if not Path(path).is_file():
            raise ValueError(f"There is no file {path}.")
        reader, options = _READERS[suffix]
        rows = load_dataset(reader, data_files=path, split="train", **options)
        if split is not None and "split" in rows.column_names:
            rows = rows.filter(lambda value: value == split, input_columns="split")
        return rows
    try:
        return load_dataset(path, split=split or "train")
    except Exception as error:
        raise ValueError(
            f"Cannot load {path!r}: expected a file ending in {', '.join(_READERS)} or the name of a dataset on the "
            f"Hub ({type(error).__name__}: {error})."
        ) from error


def _direction(rows: Dataset, pair: str, path: str, columns: Mapping[str, str], limit: int | None) -> Dataset:
    source, target = (columns.get(code, code) for code in split_pair(pair))
    missing = [name for name in (source, target) if name not in rows.column_names]
    if missing:
        raise ValueError(
            f"{path} has no column {' and no column '.join(map(repr, missing))} for {pair}; it has "
            f"{', '.join(rows.column_names)}. Map language codes to columns with columns={{code: column}}."
        )
    chosen = rows.select_columns([source, target])
    chosen = chosen.filter(lambda a, b: a is not None and b is not None, input_columns=[source, target])
    chosen = chosen.rename_columns({source: "source", target: "target"})
    if limit is not None:
        chosen = chosen.select(range(min(limit, len(chosen))))
    if not len(chosen):
        raise ValueError(f"{path} has no sentence pair for {pair}: no row has text on both sides.")
    return chosen


@dataclass
class DataCheck:
    """What a data check counted in one direction; numbers of sentence pairs."""

    sentence_pairs: int = 0
    empty: int = 0
    duplicates: int = 0
    length_ratio: int = 0
    overlap: int = 0
    dropped: int = 0


def check_parallel(
    train: Mapping[str, Dataset], held_out: Iterable[Mapping[str, Dataset]] = (), drop: bool = False
) -> tuple[dict[str, Dataset], dict[str, DataCheck]]:
    """Count what should not be in training data, and drop it only if asked.

    Counted are empty sides, repeated sentence pairs, pairs one side of which is more than three times as long as the
    other (in characters, beyond a slack for short sentences), and pairs either side of which is a held-out sentence of
    that direction.

    Args:
        train: pair → training data.
        held_out: validation and test data, each pair → data.
        drop: leave the counted sentence pairs out.

    Returns:
        The data to train on, and pair → counts.

    Raises:
        ValueError: if dropping leaves a direction with nothing.
    """
    kept, checks = {}, {}
    for pair, data in train.items():
        held = [other[pair] for other in held_out if pair in other]
        sides = [{text for other in held for text in other[side]} for side in ("source", "target")]
        keep, checks[pair] = _check_direction(data, sides[0], sides[1])
        kept[pair] = data
        if drop and len(keep) < len(data):
            if not keep:
                raise ValueError(f"The data check would drop every sentence pair of {pair}: {asdict(checks[pair])}.")
            kept[pair] = data.select(keep)
            checks[pair].dropped = len(data) - len(keep)
    return kept, checks


def _check_direction(data: Dataset, held_sources: set[str], held_targets: set[str]) -> tuple[list[int], DataCheck]:
    check = DataCheck(len(data))
    seen: set[tuple[str, str]] = set()
    keep = []
    for i, (source, target) in enumerate(zip(data["source"], data["target"], strict=True)):
        shorter, longer = sorted((len(source), len(target)))
        faults = {
            "empty": not source.strip() or not target.strip(),
            "duplicates": (source, target) in seen,
            "length_ratio": longer > MAX_LENGTH_RATIO * shorter + _LENGTH_SLACK,
            "overlap": source in held_sources or target in held_targets,
        }
        seen.add((source, target))
        for name, found in faults.items():
            setattr(check, name, getattr(check, name) + found)
        if not any(faults.values()):
            keep.append(i)
    return keep, check


def data_check_rows(checks: Mapping[str, DataCheck]) -> list[dict[str, Any]]:
    """Return one table row per direction."""
    return [
        {"pair": pair, **{f.name: getattr(check, f.name) for f in fields(check)}} for pair, check in checks.items()
    ]


def encode_parallel(
    data: Mapping[str, Dataset],
    tokenizer: Any,
    tokens: Mapping[str, str],
    *,
    source_tag: str = "source",
    max_length: int = 128,
) -> Dataset:
    """Tokenize every direction and put them one after another.

    Args:
        data: pair → Dataset with columns "source" and "target".
        tokenizer: the model's tokenizer.
        tokens: language code → its language token.
        source_tag: what the tag on the source side names.
        max_length: truncate both sides to so many tokens; for training only, references are never truncated.

    Returns:
        Dataset with columns "input_ids", "labels", and "language_pair", the position of the pair in `data`.
    """
    parts = []
    for index, (pair, rows) in enumerate(data.items()):

        def encode_rows(batch: dict[str, list], pair: str = pair, index: int = index) -> dict[str, list]:
            encoded = encode(tokenizer, pair, batch["source"], batch["target"], tokens, source_tag, max_length)
            return {**encoded, "language_pair": [index] * len(batch["source"])}

        parts.append(rows.map(encode_rows, batched=True, remove_columns=rows.column_names, desc=f"tokenizing {pair}"))
    return concatenate_datasets(parts)
