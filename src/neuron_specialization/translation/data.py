"""Parallel text: load any number of directions."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from datasets import Dataset, load_dataset

from ..neurons.language_pairs import check_pairs, split_pair

_READERS = {
    ".parquet": ("parquet", {}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".tsv": ("csv", {"delimiter": "\t", "quoting": 3, "keep_default_na": False}),  # 3: quotes are text
}


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
        max_sentences: take at most this many sentence pairs per direction, from the top.

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
