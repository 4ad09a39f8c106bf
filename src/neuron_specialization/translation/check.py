"""Check parallel text for what should not be in training data, on 64-bit hashes and one direction at a time."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from tqdm.auto import tqdm
from xxhash import xxh3_64_intdigest

from .arrow import arrow_batches

MAX_LENGTH_RATIO = 3.0
_LENGTH_SLACK = 20  # characters; the ratio of short sentences varies more


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

    Counted are empty sides, repeated sentence pairs, pairs with a side more than three times as long as expected from
    the other side, and pairs either side of which is a held-out sentence of that direction. Lengths are in characters,
    with a slack of 20 for short sentences, and the expected length follows from the direction's own median ratio: a
    Chinese sentence has a third of the characters of its translation into English.

    Sentences are compared by 64-bit hashes: among 5 million, the probability that two different ones collide is below
    10^-6. About 80 bytes per sentence pair of the largest direction are in memory at the peak.

    Args:
        train: pair → training data.
        held_out: validation and test data, each pair → data.
        drop: leave the counted sentence pairs out.

    Returns:
        The data to train on, and pair → counts.

    Raises:
        ValueError: if dropping leaves a direction with nothing.
    """
    held_out = list(held_out)
    kept, checks = {}, {}
    for pair, data in tqdm(train.items(), desc="checking data", delay=2, leave=False):
        good, checks[pair] = _check_direction(data, [other[pair] for other in held_out if pair in other])
        kept[pair] = data
        if drop and not good.all():
            if not good.any():
                raise ValueError(f"The data check would drop every sentence pair of {pair}: {asdict(checks[pair])}.")
            kept[pair] = data.select(np.flatnonzero(good))
            checks[pair].dropped = len(data) - len(kept[pair])
    return kept, checks


def _check_direction(data: Dataset, held_out: list[Dataset]) -> tuple[np.ndarray, DataCheck]:
    """Return which sentence pairs have no fault, bool [sentence pairs], and the counts."""
    hashes = {side: _hashes(data, side) for side in ("source", "target")}
    overlap = np.zeros(len(data), bool)
    for side, own in hashes.items():
        held = [_hashes(other, side) for other in held_out]
        overlap |= np.isin(own, np.concatenate(held)) if held else False
    lengths, empty = _lengths(data)
    faults = {
        "empty": empty,
        "duplicates": _repeated(hashes["source"], hashes["target"]),
        "length_ratio": _unequal(lengths),
        "overlap": overlap,
    }
    counts = {name: int(found.sum()) for name, found in faults.items()}
    return ~np.logical_or.reduce(list(faults.values())), DataCheck(len(data), **counts)


def _hashes(data: Dataset, side: str) -> np.ndarray:
    """Return a hash of each sentence, uint64 [sentences]."""
    hashes = np.empty(len(data), np.uint64)
    start = 0
    for batch in arrow_batches(data, [side]):
        text = batch.column(0).cast(pa.large_binary()).to_pylist()
        hashes[start : start + len(text)] = np.fromiter(map(xxh3_64_intdigest, text), np.uint64, len(text))
        start += len(text)
    return hashes


def warn_of_empty_sides(data: Mapping[str, Dataset], name: str) -> None:
    """Warn of directions with sentence pairs of which a side is empty: they are recorded, evaluated and scored too.

    Args:
        data: pair → Dataset with columns "source" and "target".
        name: of the data, for the warning.
    """
    found = {pair: int(_lengths(rows)[1].sum()) for pair, rows in data.items()}
    told = ", ".join(f"{number} of {pair}" for pair, number in found.items() if number)
    if told:
        warnings.warn(f"A side is empty in sentence pairs of the {name} data: {told}.", stacklevel=3)


def _lengths(data: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Return the characters of both sides, int32 [sentence pairs, 2], and which pairs have an empty side."""
    lengths, empty = np.empty((len(data), 2), np.int32), np.empty(len(data), bool)
    start = 0
    for batch in arrow_batches(data, ["source", "target"]):
        rows = slice(start, start + len(batch))
        blank = [pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(side)), 0) for side in batch.columns]
        empty[rows] = pc.or_(*blank).to_numpy(zero_copy_only=False)
        lengths[rows] = np.stack([pc.utf8_length(side).to_numpy() for side in batch.columns], axis=1)
        start += len(batch)
    return lengths, empty


def _repeated(sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return which sentence pairs occur earlier already."""
    with np.errstate(over="ignore"):
        both = sources * np.uint64(0x9E3779B97F4A7C15) ^ targets  # odd, so that no source is lost; order matters
    repeated = np.ones(len(both), bool)
    repeated[np.unique(both, return_index=True)[1]] = False
    return repeated


def _unequal(lengths: np.ndarray) -> np.ndarray:
    """Return which sentence pairs have sides of very different lengths, given the median ratio of the lengths."""
    filled = lengths[(lengths > 0).all(axis=1)]
    ratio = np.exp(np.median(np.log(filled[:, 1] / filled[:, 0]))) if len(filled) else 1.0
    # in characters of a language halfway between both, so that the reversed direction gives the same result
    sources, targets = lengths[:, 0] * ratio**0.5, lengths[:, 1] / ratio**0.5
    shorter, longer = np.minimum(sources, targets), np.maximum(sources, targets)
    return longer > MAX_LENGTH_RATIO * shorter + _LENGTH_SLACK


def data_check_rows(checks: Mapping[str, DataCheck]) -> list[dict[str, Any]]:
    """Return one table row per direction."""
    return [
        {"pair": pair, **{f.name: getattr(check, f.name) for f in fields(check)}} for pair, check in checks.items()
    ]
