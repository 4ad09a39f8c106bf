"""Is the sample large enough? Overlap of masks from halves and from growing samples with the mask of all of it."""

from collections.abc import Sequence
from typing import Any

from .activations import ActivationCounts
from .masks import NeuronMasks, intersection_over_union
from .selection import Selector

STABLE_IOU = 0.9


def stability(parts: Sequence[ActivationCounts], selector: Selector) -> dict[str, Any]:
    """Compare masks from parts of a sample with the mask from all of it.

    Args:
        parts: counts of disjoint random parts of the sample; at least two.
        selector: makes the masks.

    Returns:
        "halves": pair → IoU of the two halves' masks, averaged over blocks; "growing": a list of {"share": of the
        sample, "iou": pair → IoU with the full mask}; "unstable": pairs one of whose halves has an IoU below 0.9 with
        the full mask.

    Raises:
        ValueError: if there are fewer than two parts.
    """
    if len(parts) < 2:
        raise ValueError(f"Stability compares parts of a sample; got {len(parts)}, need two or more.")
    middle = len(parts) // 2
    first, second = parts[0].merge(*parts[1:middle]), parts[middle].merge(*parts[middle + 1 :])
    full = selector.select(first + second)
    halves = [selector.select(first), selector.select(second)]
    growing = []
    total = parts[0]
    for i, part in enumerate(parts, 1):
        total = total + part if i > 1 else part
        growing.append({"share": i / len(parts), "iou": _mean_iou(selector.select(total), full)})
    to_full = [_mean_iou(half, full) for half in halves]
    return {
        "halves": _mean_iou(*halves),
        "growing": growing,
        "unstable": [pair for pair in full.language_pairs if min(iou[pair] for iou in to_full) < STABLE_IOU],
    }


def _mean_iou(a: NeuronMasks, b: NeuronMasks) -> dict[str, float]:
    """Return pair → IoU of the two masks of that pair, averaged over blocks."""
    return {
        pair: sum(intersection_over_union(a.row(pair, name), b.row(pair, name)) for name in a.rows) / len(a.rows)
        for pair in a.language_pairs
    }
