"""Whether the mass of a model's neurons tells anything: about other views of them, and about later translations."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..neurons.activations import ActivationCounts
from .mass_activation import MassActivation

FEATURES = ("positive", "negative", "balance", "alive", "length")  # see `mass_features`
Rows = Sequence[Mapping[str, Any]]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Return Spearman's rank correlation and its two-sided p; NaN where one side has a single value.

    Needs the extra `report` (scipy).
    """
    from scipy.stats import spearmanr

    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan"), float("nan")
    found = spearmanr(a, b)
    return float(found.statistic), float(found.pvalue)


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
            correlations = {view: rank_correlation(values.tolist(), importance)[0] for view, values in views.items()}
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


def early_and_later(rows: Rows, orders: Sequence[str], score: str = "bleu") -> list[dict[str, Any]]:
    """Return what sequential models were like early and how well they translated in the end.

    Args:
        rows: one per model and direction, as in `forgetting.score_matrix`, with features (see `mass_features`).
        orders: the orders of transfer.
        score: name of the score.

    Returns:
        One row for each order, step before the last (the model before the first included) and direction, once per
        model that was trained: its features, and "later", the score after the last step.
    """
    found = []
    for steps in _runs(rows, orders):
        for step in steps[:-1]:
            found += [{**row, "later": steps[-1][pair][score]} for pair, row in step.items()]
    return found


def growth_and_change(rows: Rows, orders: Sequence[str], score: str = "bleu") -> list[dict[str, Any]]:
    """Set the growth of positive over negative mass in each step against the change of the score.

    The paper has translation improve where positive mass grows more than negative.

    Args:
        rows: see `early_and_later`.
        orders: the orders of transfer.
        score: name of the score.

    Returns:
        One row for each step that was trained and direction: "growth", the increase of positive mass minus that of
        negative mass per unit and position; "change" of the score; "trained", whether the step trained the direction.
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
                    "change": row[score] - old[score],
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


def predictors(rows: Rows, target: str, features: Sequence[str] = FEATURES) -> list[dict[str, Any]]:
    """Rank-correlate features of early models with what they became, over whatever rows there are.

    Args:
        rows: one per early model and direction, with features and the target.
        target: such as "later bleu".
        features: names of numbers in the rows; rows that lack one are left out for it.

    Returns:
        One row per feature: "rho", "p" (two-sided, not corrected for the number of features) and "n". With few runs
        that share their beginnings the rows are not independent, so that p is too small rather than too large.
    """
    table = []
    for feature in features:
        found = [(row[feature], row[target]) for row in rows if feature in row and target in row]
        rho, p = rank_correlation([a for a, _ in found], [b for _, b in found]) if found else (np.nan, np.nan)
        table.append({"feature": feature, "target": target, "rho": rho, "p": p, "n": len(found)})
    return table
