"""How far two sets of masks of one model agree: identified again after training, or on other text.

For a pair p let m be its original mask of a block, m' the other one, n and n' their neurons, of d:

- own     IoU(m'_p, m_p), how much of the pair's neurons is found again;
- others  IoU(m'_p, m_q), mean over the directions q that differ from p in the language that the stack sees and share
          the other one: agreement that says nothing about the pair;
- chance  e / (n + n' - e) with e = n n' / d: what as many neurons drawn at random would have in common.

A pair's neurons are its own in so far as "own" is above "others", and specialized at all in so far as it is above
"chance".
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..neurons.ffn import ENCODER, STACKS
from ..neurons.language_pairs import split_pair
from ..neurons.masks import NeuronMasks, intersection_over_union


def comparable_pairs(language_pairs: Sequence[str], stack: str) -> dict[str, list[str]]:
    """Return pair → the pairs with another language on the side that the stack sees and the same one on the other.

    In the encoder these are other sources of the same target, in the decoder other targets of the same source. Pairs
    without any are left out: of directions out of and into a pivot, the encoder's are those into it and the
    decoder's those out of it.
    """
    side = STACKS.index(stack)
    codes = {pair: split_pair(pair) for pair in language_pairs}
    found = {
        pair: [q for q, other in codes.items() if other[side] != own[side] and other[1 - side] == own[1 - side]]
        for pair, own in codes.items()
    }
    return {pair: others for pair, others in found.items() if others}


def mask_agreement(originals: NeuronMasks, other: NeuronMasks) -> list[dict[str, Any]]:
    """Return one row per block: "own", the "lowest" of any pair, "others" and "chance", as means over pairs.

    The pairs are those that both hold and that have others to be compared with (`comparable_pairs`); where none has,
    all of them, and "others" is None.

    Args:
        originals: the masks that are looked for.
        other: masks of the same blocks.

    Raises:
        ValueError: if the two differ in their blocks, or share no pair.
    """
    if originals.d_ff != other.d_ff:
        raise ValueError(
            f"These masks are of different models: {len(originals.d_ff)} and {len(other.d_ff)} blocks, or other sizes."
        )
    shared = [pair for pair in originals.language_pairs if pair in other.language_pairs]
    if not shared:
        raise ValueError(
            f"These masks share no language pair: {', '.join(originals.language_pairs)} and "
            f"{', '.join(other.language_pairs)}."
        )
    rows: list[dict[str, Any]] = []
    layers = dict.fromkeys(STACKS, 0)
    for block, stack in originals.stacks.items():
        among = comparable_pairs(shared, stack) or {pair: [] for pair in shared}
        rows.append(
            {"stack": stack, "layer": layers[stack], "block": block, **_agreement(originals, other, block, among)}
        )
        layers[stack] += 1
    return sorted(rows, key=lambda row: row["stack"] != ENCODER)


def mean_agreement(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of `mask_agreement`, with the name of their "masks", averaged where that name occurs several
    times, as for several seeds. "lowest" is the lowest of all."""
    keys = ("masks", "stack", "layer", "block")
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    averaged = []
    for place, members in groups.items():
        values = {name: [row[name] for row in members] for name in ("own", "others", "chance")}
        means = {name: None if None in found else float(np.mean(found)) for name, found in values.items()}
        lowest = min(row["lowest"] for row in members)
        averaged.append({**dict(zip(keys, place, strict=True)), **means, "lowest": lowest, "times": len(members)})
    return averaged


def _agreement(
    originals: NeuronMasks, other: NeuronMasks, block: str, among: dict[str, list[str]]
) -> dict[str, float | int | None]:
    own, chance, others = [], [], []
    for pair, rivals in among.items():
        found, expected = other.row(pair, block), originals.row(pair, block)
        own.append(intersection_over_union(found, expected))
        n, m = int(found.sum()), int(expected.sum())
        by_chance = n * m / len(expected)
        chance.append(by_chance / (n + m - by_chance))
        others += [intersection_over_union(found, originals.row(rival, block)) for rival in rivals]
    return {
        "own": float(np.mean(own)),
        "lowest": min(own),
        "others": float(np.mean(others)) if others else None,
        "chance": float(np.mean(chance)),
        "pairs": len(own),
    }
