"""Overlap of specialized neurons per layer, and whether it correlates with the distance between languages.

Encoder overlap is measured between directions into one pivot language and decoder overlap between directions out of it
(Neuron Specialization, section 5.3), so that the side compared differs and the other does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..neurons.ffn import ENCODER, STACKS
from ..neurons.language_pairs import DEFAULT_PAIR, split_pair
from ..neurons.masks import NeuronMasks

FEWEST_LANGUAGES = 7  # six have 720 orders, too few for a p-value that survives a correction over layers
_ROUNDING = 1e-8  # of the length of ranks: what is left of them below this is error of the arithmetic


@dataclass(frozen=True)
class Overlap:
    """Intersection over union of languages' specialized neurons in one stack.

    Attributes:
        stack: "encoder" (languages are sources, the pivot the target) or "decoder" (the reverse).
        languages: codes of the n languages compared.
        blocks: names of the FFN blocks, first layer first.
        iou: float64 [blocks, n, n], 1 on the diagonals.
    """

    stack: str
    languages: list[str]
    blocks: list[str]
    iou: np.ndarray

    def depth_curve(self) -> np.ndarray:
        """Return the mean over pairs of different languages, per block: float64 [blocks]."""
        return self.iou[:, *np.triu_indices(len(self.languages), 1)].mean(1)

    def by_family(self, families: Sequence[str]) -> dict[str, np.ndarray]:
        """Return "within" and "across": the mean over pairs of languages of one family and of two, float64 [blocks].

        NaN where no pair is of that kind.
        """
        rows, columns = np.triu_indices(len(self.languages), 1)
        names = np.array(families)
        same = names[rows] == names[columns]
        values = self.iou[:, rows, columns]
        groups = {"within": values[:, np.flatnonzero(same)], "across": values[:, np.flatnonzero(~same)]}
        empty = np.full(len(self.blocks), np.nan)
        return {name: chosen.mean(1) if chosen.shape[1] else empty for name, chosen in groups.items()}


def neuron_overlap(masks: NeuronMasks, stack: str, pivot: str) -> Overlap:
    """Measure the overlap of every two languages' neurons in one stack.

    Args:
        masks: masks of directions into the pivot (encoder) or out of it (decoder), and maybe others.
        stack: "encoder" or "decoder".
        pivot: the language on the other side.

    Raises:
        ValueError: if the stack is unknown, or fewer than two directions fit.
    """
    if stack not in STACKS:
        raise ValueError(f"Expected 'encoder' or 'decoder', got {stack!r}.")
    side = STACKS.index(stack)
    codes = {pair: split_pair(pair) for pair in masks.language_pairs if pair != DEFAULT_PAIR}
    fitting = {sides[side]: pair for pair, sides in codes.items() if sides[1 - side] == pivot}
    if len(fitting) < 2:
        wanted = f"into {pivot}" if stack == ENCODER else f"out of {pivot}"
        raise ValueError(
            f"Overlap in the {stack} compares directions {wanted}; these masks have {len(fitting)} "
            f"({', '.join(fitting.values()) or 'none'} of {', '.join(masks.language_pairs)})."
        )
    blocks = [name for name in masks.rows if masks.stacks[name] == stack]
    iou = np.empty((len(blocks), len(fitting), len(fitting)))
    for b, block in enumerate(blocks):
        iou[b] = masks.iou_matrix(block, list(fitting.values())).numpy()
    return Overlap(stack, list(fitting), blocks, iou)


def overlaps_by_stack(
    masks: Mapping[str, NeuronMasks], pivot: str
) -> tuple[dict[str, dict[str, Overlap]], dict[str, str]]:
    """Return stack → name of the masks → overlap, and of the stacks left out, stack → why.

    A stack is left out where some of the masks have fewer than two directions to compare: masks of one side of the
    pivot have the other stack.

    Args:
        masks: name → masks.
        pivot: see `neuron_overlap`.

    Raises:
        ValueError: if both stacks are left out, or the masks are of different languages.
    """
    found: dict[str, dict[str, Overlap]] = {}
    left_out: dict[str, str] = {}
    for stack in STACKS:
        try:
            overlaps = {name: neuron_overlap(each, stack, pivot) for name, each in masks.items()}
        except ValueError as error:
            left_out[stack] = str(error)
            continue
        languages = next(iter(overlaps.values())).languages
        for name, overlap in overlaps.items():
            if overlap.languages != languages:
                raise ValueError(f"The masks {name} are of other languages: {', '.join(overlap.languages)}.")
        found[stack] = overlaps
    if not found:
        raise ValueError(next(iter(left_out.values())))
    return found, left_out


def mantel(
    overlap: np.ndarray,
    distances: np.ndarray,
    controlled: Sequence[np.ndarray] = (),
    permutations: int = 9999,
    seed: int = 0,
) -> dict[str, float | None]:
    """Test whether languages overlap more the closer they are: Spearman's Mantel test, permuting language labels.

    The permutations are scipy's; scikit-bio's Mantel test has no partial form. In the partial test the labels of the
    overlap itself are permuted, not those of its residuals, and what is controlled for is regressed out of each order
    (Legendre, 2000, method 1; R's vegan does so too). It finds little where a single language has a label of its own.

    Args:
        overlap: [n, n], symmetric; the IoU of one layer.
        distances: [n, n], symmetric.
        controlled: further distances [n, n] whose ranks are regressed out of both first (partial Mantel test).
        permutations: random draws of labels; with no more possible orders than that, all of them.
        seed: of the draws.

    Returns:
        "rho": Spearman's correlation over pairs of languages, negative where close languages overlap more; "p":
        two-sided, None below 7 languages. Both are None where nothing is left to correlate: one side has a single
        value, or the controlled distances explain all of its ranks.

    Raises:
        ValueError: if the matrices differ in size, or there are fewer than 3 languages.
    """
    from scipy.stats import permutation_test, rankdata  # an optional dependency

    n = len(overlap)
    if n < 3:
        raise ValueError(f"Overlap is compared with distance between 3 languages at least, 7 for a p-value; got {n}.")
    if any(matrix.shape != (n, n) for matrix in (overlap, distances, *controlled)):
        shapes = [list(matrix.shape) for matrix in (overlap, distances, *controlled)]
        raise ValueError(f"Expected [n, n] matrices of the same languages, got {shapes}.")
    pairs = np.triu_indices(n, 1)
    basis = np.stack([np.ones(len(pairs[0])), *(rankdata(matrix[pairs]) for matrix in controlled)], axis=1)
    solve = np.linalg.pinv(basis)
    ranks = np.zeros((n, n))
    ranks[pairs] = rankdata(overlap[pairs])
    ranks += ranks.T

    def residual(values: np.ndarray) -> np.ndarray:
        left = values - basis @ (solve @ values)
        return left if np.linalg.norm(left) > _ROUNDING * np.linalg.norm(values) else np.zeros_like(left)

    target = residual(rankdata(distances[pairs]))

    def correlation(order: np.ndarray) -> float:
        order = order.astype(int)
        values = residual(ranks[np.ix_(order, order)][pairs])
        scale = np.linalg.norm(values) * np.linalg.norm(target)
        return float(values @ target / scale) if scale else 0.0

    if not (target.any() and residual(ranks[pairs]).any()):
        return {"rho": None, "p": None}
    if n < FEWEST_LANGUAGES:
        return {"rho": correlation(np.arange(n)), "p": None}
    result = permutation_test(
        (np.arange(n),), correlation, permutation_type="pairings", vectorized=False, n_resamples=permutations,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return {"rho": float(result.statistic), "p": float(result.pvalue)}


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number by Holm's step-down rule, in the order given."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(np.asarray(p_values, dtype=np.float64)[order] * factors), 1)
    result = np.empty(len(order))
    result[order] = adjusted
    return result.tolist()


def overlap_rows(
    overlap: Overlap,
    distances: np.ndarray,
    families: Sequence[str] | None = None,
    controlled: Mapping[str, np.ndarray] | None = None,
    permutations: int = 9999,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return one row per block: mean IoU, within and across families, and the Mantel tests, corrected over layers.

    None stands for a mean of no pair, and for what `mantel` cannot tell.

    Args:
        overlap: of one stack.
        distances: [n, n] between its languages, in their order.
        families: family of each language.
        controlled: name → further distances; with any, "partial rho" and "partial p" have all of them regressed out.
        permutations: see `mantel`.
        seed: see `mantel`.
    """
    groups = {} if families is None else overlap.by_family(families)
    tests = {"": [mantel(iou, distances, (), permutations, seed) for iou in overlap.iou]}
    if controlled:
        extra = list(controlled.values())
        tests["partial "] = [mantel(iou, distances, extra, permutations, seed) for iou in overlap.iou]
    rows: list[dict[str, Any]] = [
        {"stack": overlap.stack, "layer": i, "block": name, "iou": mean}
        for i, (name, mean) in enumerate(zip(overlap.blocks, overlap.depth_curve().tolist(), strict=True))
    ]
    for name, values in groups.items():
        for row, value in zip(rows, values.tolist(), strict=True):
            row[name] = None if np.isnan(value) else value
    for prefix, results in tests.items():
        p_values = [result["p"] for result in results if result["p"] is not None]
        corrected = iter(holm(p_values))
        for row, result in zip(rows, results, strict=True):
            row[f"{prefix}rho"] = result["rho"]
            row[f"{prefix}p"] = None if result["p"] is None else next(corrected)
    return rows
