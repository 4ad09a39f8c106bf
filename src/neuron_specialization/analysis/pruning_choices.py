"""Which neurons a pruning experiment takes out, by the name of a choice; and tables of what that did."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..neurons.activations import ActivationCounts
from ..neurons.ffn import find_ffn_blocks
from ..neurons.language_pairs import DEFAULT_PAIR, Routes, split_pair
from ..neurons.masks import NeuronMasks
from ..neurons.selection import CumulativeThreshold
from .forgetting import score_matrix, transfer_of
from .mass_activation import MassActivation
from .pruning import BY_LANGUAGE, BY_TOKEN, CRITERIA, mass_matched, prune, pruning_scores

UNSPECIALIZED, MASS_MATCHED = "unspecialized", "mass_matched"
Scope = Literal["layer", "global"]
Rows = Sequence[Mapping[str, Any]]


def check_choices(
    choices: Iterable[str],
    rates: Iterable[float],
    scopes: Iterable[str],
    language_pairs: Sequence[str],
    model: nn.Module,
) -> None:
    """Refuse, before anything is trained or recorded, what `choose` cannot do.

    Args:
        choices: a criterion of `pruning.CRITERIA`; "unspecialized:PAIR"; or "mass_matched:CRITERION".
        rates: shares of the neurons.
        scopes: "layer", "global".
        language_pairs: those recorded.
        model: the model to prune.

    Raises:
        ValueError: if one is unknown, a rate is not in [0, 1), or neurons are chosen by negative mass in a model whose
            activation function has no negative values, or by their languages where each side has one.
    """
    for rate in rates:
        if not 0 <= rate < 1:
            raise ValueError(f"The pruning rate is a share in [0, 1), got {rate!r}.")
    unknown = sorted(set(scopes) - {"layer", "global"})
    if unknown:
        raise ValueError(f"scopes are layer and global, got {', '.join(unknown)}.")
    for choice in choices:
        name, _, of = choice.partition(":")
        known: Sequence[str] = {UNSPECIALIZED: language_pairs, MASS_MATCHED: CRITERIA}.get(name, [""])
        if name not in (*CRITERIA, UNSPECIALIZED, MASS_MATCHED) or of not in known:
            raise ValueError(
                f"Expected criteria of {', '.join(CRITERIA)}, {UNSPECIALIZED}:PAIR (of {', '.join(language_pairs)}) "
                f"or {MASS_MATCHED}:CRITERION, got {choice!r}."
            )
        if "most_negative" in choice and not any(
            _goes_below_zero(block.activation) for block in find_ffn_blocks(model)
        ):
            raise ValueError(
                f"{choice!r} needs neurons with negative values, which this model's activation function has not (a "
                "ReLU?). Use a model with GELU."
            )
        sides = zip(*map(split_pair, language_pairs), strict=True)
        if choice.rpartition(":")[2] in BY_LANGUAGE and all(len(set(codes)) == 1 for codes in sides):
            raise ValueError(
                f"{choice!r} compares the source languages in the encoder and the target languages in the decoder; "
                f"{', '.join(language_pairs)} has one of each."
            )


def _goes_below_zero(activation: Any) -> bool:
    return bool((activation(torch.linspace(-4, 4, 81)) < 0).any())


def needs_tokens(choices: Iterable[str]) -> bool:
    """Return whether any of the choices needs credit by token."""
    return any(choice.rpartition(":")[2] in BY_TOKEN for choice in choices)


def parse_exports(words: Iterable[str]) -> list[tuple[str, float]]:
    """Return the choice and the rate of each word such as "dead=0.1".

    Raises:
        ValueError: if a word is none of these.
    """
    found = []
    for word in words:
        choice, _, rate = word.rpartition("=")
        try:
            found.append((choice, float(rate)))
        except ValueError:
            raise ValueError(f"Expected criterion=rate to export, such as dead=0.1, got {word!r}.") from None
    return found


def choose(mass: MassActivation, choice: str, rate: float, scope: Scope = "layer", draw: int = 0) -> NeuronMasks:
    """Return masks of a single pair, "default", that keep all but the neurons chosen.

    - a criterion of `pruning.CRITERIA`: see `pruning_scores`;
    - "unspecialized:en-de": the neurons outside the pair's masks with k = 1 - `rate` (`CumulativeThreshold`), whatever
      share of the neurons that is;
    - "mass_matched:most_positive": random neurons with as much positive mass as those that the criterion takes.

    Args:
        mass: recorded on validation text, one set for each language pair.
        choice: one of these.
        rate: share of the neurons to prune, in [0, 1).
        scope: of the share: "layer" or "global".
        draw: seed of what is random.

    Raises:
        ValueError: as `check_choices`, `pruning_scores` and `prune` do.
    """
    name, _, of = choice.partition(":")
    if name == UNSPECIALIZED:
        counts = ActivationCounts(mass.names, mass.active, mass.positions, mass.stacks, mass.fingerprint)
        masks = CumulativeThreshold(1 - rate).select(counts)
        rows = {block: masks.row(of, block).unsqueeze(0).clone() for block in masks.rows}
        selector = {"name": UNSPECIALIZED, "pair": of, "k": 1 - rate}
        return NeuronMasks(rows=rows, routes=Routes.per_pair([DEFAULT_PAIR]), selector=selector, **mass.origin)
    criterion = of if name == MASS_MATCHED else name
    masks = prune(pruning_scores(mass, criterion, draw), rate, mass.origin, scope)
    drawn = {"draw": draw} if criterion == "random" else {}
    masks = replace(masks, selector={**masks.selector, "criterion": criterion, **drawn})
    return mass_matched(masks, mass, draw) if name == MASS_MATCHED else masks


def pruning_table(transfer: Rows, pruned: Rows, score: str = "bleu") -> list[dict[str, Any]]:
    """Return one table row per choice of neurons, averaged over draws: quality, forgetting and robustness.

    Args:
        transfer: rows of the sequential transfer (see `score_matrix`).
        pruned: one per pruned model and direction: as those, and "when", "criterion", "rate", "scope", "draw",
            "pruned" (share of the neurons), what `pruning.mass_shares` returns, and noisy scores ("noisy bleu").
            Criterion "none" is the whole model.
        score: name of the score.

    Returns:
        "pruned", the shares of mass, the score averaged over the pairs trained so far, the difference from the whole
        model, forgetting (from the second step on; see `forgetting`) and what noise costs; where there are several
        draws, their number and the "lowest" and "highest" score.
    """
    keys = ("method", "order", "seed", "when", "criterion", "scope", "rate")
    groups: dict[tuple, dict[int, list[Mapping[str, Any]]]] = {}
    for row in pruned:
        groups.setdefault(tuple(row[key] for key in keys), {}).setdefault(row["draw"], []).append(row)
    table = []
    for key, draws in groups.items():
        about = dict(zip(keys, key, strict=True))
        lines = [_measured(transfer, rows, score) for rows in draws.values()]
        means = {name: float(np.mean([line[name] for line in lines])) for name in lines[0]}
        scores = [line[score] for line in lines]
        spread = {"lowest": min(scores), "highest": max(scores)} if len(lines) > 1 else {}
        table.append({**about, "draws": len(draws), **means, **spread})
    whole = {_of_model(line): line[score] for line in table if line["criterion"] == "none"}
    for line in table:
        if _of_model(line) in whole:
            line["change"] = line[score] - whole[_of_model(line)]
    return table


def _of_model(line: Mapping[str, Any]) -> tuple:
    return tuple(line[key] for key in ("method", "order", "seed", "when"))


def _measured(transfer: Rows, rows: Rows, score: str) -> dict[str, float]:
    order, method, seed = (rows[0][key] for key in ("order", "method", "seed"))
    pairs = order.split("/")
    seen = [row for row in rows if row["direction"] in pairs]
    measures = ("pruned", "positive mass", "negative mass", score, f"noisy {score}", "loss")
    values = {name: float(np.mean([row[name] for row in seen])) for name in measures}
    values["noise costs"] = values[score] - values[f"noisy {score}"]
    others = [row for row in transfer if (row["method"], row["order"], row["seed"]) != (method, order, seed)]
    matrix = score_matrix([*others, *rows], order, score, method, seed)
    if len(pairs) > 1 and not np.isnan(matrix).any():
        values["forgetting"] = transfer_of(matrix)["mean"]["forgetting"]
    return values
