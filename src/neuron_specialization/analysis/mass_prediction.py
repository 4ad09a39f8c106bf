"""Whether the mass of a model's neurons tells anything: about other views of them, and about later translations."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..neurons.activations import ActivationCounts
from .mass_activation import MassActivation

FEATURES = ("positive", "negative", "balance", "alive", "length")  # see `mass_features`
Rows = Sequence[Mapping[str, Any]]
_PERMUTATIONS = 9999


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation; NaN where there are fewer than three values or one side has a single value.

    Needs the extra `report` (scipy).
    """
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic) if len(a) >= 3 and np.ptp(a) and np.ptp(b) else float("nan")


def permutation_p(a: Sequence[float], b: Sequence[float], groups: Sequence[Any]) -> float:
    """Return the two-sided p of `rank_correlation` when the values of `b` change places inside their groups only."""
    from scipy.stats import rankdata

    found = rank_correlation(a, b)
    if np.isnan(found):
        return found
    first, second = (rankdata(side) - (len(a) + 1) / 2 for side in (a, b))
    draw, drawn = np.random.default_rng(0), np.tile(second, (_PERMUTATIONS, 1))
    for group in dict.fromkeys(groups):
        places = [i for i, of in enumerate(groups) if of == group]
        drawn[:, places] = draw.permuted(drawn[:, places], axis=1)
    by_chance = drawn @ first / (np.linalg.norm(first) * np.linalg.norm(second))
    return float((1 + (np.abs(by_chance) >= abs(found) - 1e-9).sum()) / (1 + _PERMUTATIONS))


def mass_against_attribution(mass: MassActivation, attribution: ActivationCounts) -> list[dict[str, Any]]:
    """Rank-correlate, over the neurons of each layer, their mass with the loss attributed to them, |a · dL/da|.

    Args:
        mass: recorded at site "neurons".
        attribution: what `record_attribution` returns for the same model and text, language pairs for names.

    Returns:
        One row per set of text and layer: Spearman's correlation of attribution with the whole mass (positive plus
        negative), with the number of positions at which a neuron is active, and with its credit.

    Raises:
        ValueError: if the recordings are of different models, sets of text or sites.
    """
    if mass.site != "neurons":
        raise ValueError(f"Attribution is that of neurons; the mass was recorded at site {mass.site!r}.")
    widths = [{layer: of.shape[1] for layer, of in sums.items()} for sums in (mass.credit, attribution.counts)]
    if mass.fingerprint != attribution.fingerprint or widths[0] != widths[1]:
        raise ValueError(
            f"These recordings are of different models: {mass.fingerprint} with {widths[0]} and "
            f"{attribution.fingerprint} with {widths[1]}."
        )
    if mass.names != attribution.language_pairs:
        raise ValueError(f"These recordings hold other text: {mass.names} and {attribution.language_pairs}.")
    rows = []
    for row, name in enumerate(mass.names):
        for layer in mass.credit:
            views = {
                "mass": mass.positive[layer][row] + mass.negative[layer][row],
                "active": mass.active[layer][row],
                "credit": mass.credit[layer][row],
            }
            importance = attribution.counts[layer][row].tolist()
            correlations = {view: rank_correlation(values.tolist(), importance) for view, values in views.items()}
            rows.append({"name": name, "layer": layer, **correlations})
    return rows


def mass_features(mass: MassActivation, name: str) -> dict[str, float]:
    """Return what a recording says of one set of text in a few numbers, averaged over layers.

    Returns:
        "positive" and "negative" mass per unit and position, "balance", the share of the mass that is positive,
        "alive", the share of units that are the arg-max somewhere, and, where tokens were recorded, "length", the
        number of distinct tokens of those that are.
    """
    row = mass.names.index(name)
    found: dict[str, list[float]] = {}
    for layer, stack in mass.stacks.items():
        positions = max(1, int(mass.positions[stack][row]))
        positive, negative = (side[layer][row].mean().item() / positions for side in (mass.positive, mass.negative))
        alive = mass.alive(name, layer)
        values = {"positive": positive, "negative": negative, "balance": positive / max(positive + negative, 1e-300)}
        values["alive"] = alive.double().mean().item()
        if mass.token_ids and alive.any():
            values["length"] = mass.length(name, layer)[alive].double().mean().item()
        for key, value in values.items():
            found.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in found.items()}


def add_features(rows: Rows, about: Mapping[str, Any], mass: MassActivation) -> list[dict[str, Any]]:
    """Return the rows of one model, those that hold what `about` says, with the features of their direction."""
    chosen = (row for row in rows if all(row[key] == value for key, value in about.items()))
    return [{**row, **mass_features(mass, row["direction"])} for row in chosen]


def early_and_later(rows: Rows, orders: Sequence[str]) -> list[dict[str, Any]]:
    """Return what sequential models were like early and how well the last of them translated.

    Args:
        rows: one per model and direction, as in `forgetting.score_matrix`, with features (see `mass_features`).
        orders: the orders of transfer.

    Returns:
        One row for each order, seed and direction, so that each outcome stands once: the features, averaged over the
        models before the last step (the pre-trained one, which all orders of a seed share, included), and "later",
        the BLEU after the last step.
    """
    found = []
    for steps in _runs(rows, orders):
        for pair, last in steps[-1].items():
            early = [step[pair] for step in steps[:-1]]
            known = [name for name in FEATURES if all(name in row for row in early)]
            features = {name: float(np.mean([row[name] for row in early])) for name in known}
            about = {name: last[name] for name in ("order", "seed", "direction")}
            found.append({**about, **features, "later": last["bleu"]})
    return found


def growth_and_change(rows: Rows, orders: Sequence[str]) -> list[dict[str, Any]]:
    """Set the growth of positive over negative mass in each step against the change of BLEU.

    The paper has translation improve where positive mass grows more than negative.

    Args:
        rows: see `early_and_later`.
        orders: the orders of transfer.

    Returns:
        One row for each step that was trained and direction: "growth", the increase of positive mass minus that of
        negative mass per unit and position; "change" of BLEU; "trained", whether the step trained the direction.
    """
    found: dict[tuple, dict[str, Any]] = {}
    for steps in _runs(rows, orders):
        for before, after in zip(steps[:-1], steps[1:], strict=True):
            for pair, row in after.items():
                old = before[pair]
                growth = (row["positive"] - old["positive"]) - (row["negative"] - old["negative"])
                found[row["order"], row["seed"], pair] = {
                    **{name: row[name] for name in ("order", "seed", "direction")},
                    "growth": growth,
                    "change": row["bleu"] - old["bleu"],
                    "trained": row["order"].split("/")[-1] == pair,
                }
    return list(found.values())


def _runs(rows: Rows, orders: Sequence[str]) -> list[list[dict[str, Mapping[str, Any]]]]:
    """Return, for each order and seed that is there whole, direction → row after each step, the first before any."""
    by_model: dict[tuple, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["method"] in ("pretraining", "sequential"):
            by_model.setdefault((row["seed"], row["order"]), {})[row["direction"]] = row
    runs = []
    for seed in sorted({row["seed"] for row in rows}):
        for order in orders:
            pairs = order.split("/")
            steps = [by_model.get((seed, "/".join(pairs[:step]))) for step in range(len(pairs) + 1)]
            runs.append([step for step in steps if step is not None] if None not in steps else [])
    return [run for run in runs if run]


def predictors(
    rows: Rows, target: str, features: Sequence[str] = FEATURES, within: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Rank-correlate features of models with what became of them, over whatever rows there are.

    Args:
        rows: one per outcome, with features and the target.
        target: such as "later".
        features: names of numbers in the rows; rows that lack one are left out for it.
        within: columns; from feature and target the mean over the rows that agree in these is subtracted first.

    Returns:
        One row per feature: "rho", "p" (two-sided, by permutation among the rows that agree in `within`; not corrected
        for the number of features), "n", and "outcomes", the number of distinct values of the target. With few runs
        that share their beginnings the rows are not independent, so that p is too small rather than too large.
    """
    table = []
    for feature in features:
        chosen = [row for row in rows if feature in row and target in row]
        groups = [tuple(row[name] for name in within) for row in chosen]
        x, y = (_centered([row[name] for row in chosen], groups) for name in (feature, target))
        found = {"rho": rank_correlation(x, y), "p": permutation_p(x, y, groups)}
        outcomes = len({row[target] for row in chosen})
        table.append({"feature": feature, "target": target, **found, "n": len(chosen), "outcomes": outcomes})
    return table


def growth_table(steps: Rows) -> list[dict[str, Any]]:
    """Rank-correlate the growth of positive over negative mass with the change of the score, in two ways.

    Args:
        steps: what `growth_and_change` returns.

    Returns:
        The row of `predictors` over all steps and directions ("pooled"), and the one "within steps": what tells the
        directions of a step from each other. Growth shifts from step to step for all directions alike, which hides
        that in a pooled correlation. There values are centered, and not ranked in each step, because the order of two
        directions whose scores both hardly change is chance, and would weigh as much as that of the one trained.
    """
    ways: dict[str, tuple[str, ...]] = {"pooled": (), "within steps": ("order", "seed")}
    return [
        {"compared": name, **line}
        for name, columns in ways.items()
        for line in predictors(steps, "change", ["growth"], columns)
    ]


def _centered(values: Sequence[float], groups: Sequence[Any]) -> list[float]:
    """Return values minus the mean of their group."""
    members: dict[Any, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        members.setdefault(group, []).append(value)
    return [value - float(np.mean(members[group])) for value, group in zip(values, groups, strict=True)]
