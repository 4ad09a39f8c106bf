"""Encode parallel text once: the result is cached on disk by content, for later runs and for other processes."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value, concatenate_datasets
from xxhash import xxh3_128

from .arrow import arrow_batches
from .data_files import progress_bars
from .tokenization import encode

_FEATURES = Features(
    {
        "input_ids": datasets.List(Value("int32")),
        "labels": datasets.List(Value("int32")),
        "language_pair": Value("int32"),
        "length": Value("int32"),
    }
)
_TEXT = pa.schema([("source", pa.large_string()), ("target", pa.large_string())])  # files may hold either string type
_BATCH = 4096
_BAR_FROM = 50_000  # sentence pairs; fewer take seconds
_SAMPLE = 16


def encode_parallel(
    data: Mapping[str, Dataset],
    tokenizer: Any,
    tokens: Mapping[str, str],
    *,
    source_tag: str = "source",
    max_length: int = 128,
    num_workers: int = 1,
) -> Dataset:
    """Tokenize every direction and put them one after another.

    The result is a memory-mapped file below `datasets.config.HF_DATASETS_CACHE`, in "neuron_specialization", found
    again whenever the same text is encoded with the same tokenizer and settings, wherever the text was loaded from.

    Args:
        data: pair → Dataset with columns "source" and "target".
        tokenizer: the model's tokenizer.
        tokens: language code → its language token.
        source_tag: what the tag on the source side names.
        max_length: truncate both sides to this many tokens; for training only, references are never truncated.
        num_workers: processes that tokenize.

    Returns:
        Dataset with columns "input_ids", "labels", "language_pair", the position of the pair in `data`, and "length",
        the number of tokens of both sides.
    """
    settings = {"tokens": dict(tokens), "source_tag": source_tag, "max_length": max_length}
    key = _digest(data, tokenizer, settings)
    directory = Path(datasets.config.HF_DATASETS_CACHE) / "neuron_specialization"
    directory.mkdir(parents=True, exist_ok=True)
    rows = concatenate_datasets(list(data.values()))
    ends = np.cumsum([len(part) for part in data.values()])
    with progress_bars(len(rows) >= _BAR_FROM):
        return rows.map(
            _encode_batch,
            batched=True,
            batch_size=_BATCH,
            writer_batch_size=_BATCH,
            with_indices=True,
            remove_columns=rows.column_names,
            features=_FEATURES,
            num_proc=num_workers if num_workers > 1 and len(rows) > _BATCH else None,
            fn_kwargs={"tokenizer": tokenizer, "pairs": list(data), "ends": ends, **settings},
            cache_file_name=str(directory / f"{key}.arrow"),
            new_fingerprint=key,
            desc="tokenizing",
        )


def _encode_batch(
    batch: dict[str, list],
    indices: list[int],
    *,
    tokenizer: Any,
    pairs: list[str],
    ends: np.ndarray,
    **settings: Any,
) -> dict[str, Any]:
    """Encode rows that may belong to several directions, one after another; `ends` says where each one ends."""
    directions = np.searchsorted(ends, indices, side="right")
    encoded: dict[str, list] = {"input_ids": [], "labels": []}
    for direction in np.unique(directions):
        first, past = np.searchsorted(directions, [direction, direction + 1])
        sources, targets = (batch[side][first:past] for side in ("source", "target"))
        part = encode(tokenizer, pairs[direction], sources, targets, **settings)
        for name, column in encoded.items():
            column += part[name]
    lengths = [len(source) + len(target) for source, target in zip(*encoded.values(), strict=True)]
    return {**encoded, "language_pair": directions, "length": lengths}


def _digest(data: Mapping[str, Dataset], tokenizer: Any, settings: Mapping[str, Any]) -> str:
    """Return a digest of all that an encoding depends on, the same in every process.

    datasets would hash the tokenizer as an object, which holds what its last call left there.
    """
    digest = xxh3_128(json.dumps(settings, sort_keys=True).encode())
    digest.update(vocabulary_of(tokenizer))
    for pair, rows in data.items():
        digest.update(f"{pair} {len(rows)}".encode())
        sample = rows[:_SAMPLE]
        # a sample stands for the tokenizer's many settings of tags, special tokens and truncation
        sources, targets = ([*sample[side], " ".join(sample[side] * 8)] for side in ("source", "target"))
        digest.update(json.dumps(encode(tokenizer, pair, sources, targets, **settings)).encode())
        _add_text(digest, rows)
    return digest.hexdigest()


def text_digest(data: Mapping[str, Dataset]) -> str:
    """Return a digest of the sentence pairs of every direction, wherever they were loaded from."""
    digest = xxh3_128()
    for pair, rows in data.items():
        digest.update(f"{pair} {len(rows)}".encode())
        _add_text(digest, rows)
    return digest.hexdigest()


def _add_text(digest: Any, rows: Dataset) -> None:
    for batch in arrow_batches(rows, ["source", "target"]):
        digest.update(batch.cast(_TEXT).serialize())


def vocabulary_of(tokenizer: Any) -> bytes:
    """Return how a tokenizer cuts text, without what its last call left in it."""
    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        for state in ("truncation", "padding", "post_processor"):
            parts.pop(state)
        return json.dumps(parts, sort_keys=True).encode()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_vocabulary(directory)
        files = b"".join(path.read_bytes() for path in sorted(Path(directory).iterdir()))
    return files + json.dumps(sorted(tokenizer.get_added_vocab().items())).encode()
