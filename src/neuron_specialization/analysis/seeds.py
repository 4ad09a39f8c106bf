"""Models that were trained with several seeds: means and deviations over seeds, and paired tests.

Values are rows with "measure", "group" (such as of languages), "place" (such as a layer), "model", "seed" and "value".
A seed's values of one cell are averaged first.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

Values = Sequence[Mapping[str, Any]]

_FEWEST_SEEDS = 3


def summarize(values: Values) -> list[dict[str, Any]]:
    """Return one row per measure, group, place and model: "mean" over seeds, "deviation" (None for one), "seeds"."""
    rows = []
    for (measure, group, place, model), by_seed in _by_cell(values).items():
        seeds = np.array(list(by_seed.values()))
        deviation = float(seeds.std(ddof=1)) if len(seeds) > 1 else None
        named = {"measure": measure, "group": group, "place": place, "model": model}
        rows.append({**named, "mean": float(seeds.mean()), "deviation": deviation, "seeds": len(seeds)})
    return rows


def compare(values: Values, source: str) -> list[dict[str, Any]]:
    """Return tests of every model with three seeds or more against the source and against models with the same seeds.

    The source, which the others were trained from, is a fixed number, the mean of its seeds where it has several;
    other models are paired seed by seed. "p" is of a two-sided t-test of the differences; "p_adjusted" controls the
    false discovery rate over the rows of one measure (Benjamini-Hochberg). Models whose seeds all differ by the same
    number are not tested.
    """
    from scipy.stats import false_discovery_control, ttest_1samp, ttest_rel  # an optional dependency

    cells = _by_cell(values)
    rows: list[dict[str, Any]] = []
    for (measure, group, place), models in _regrouped(cells).items():
        for first, second in combinations(models, 2):
            first, second = (second, first) if second == source else (first, second)
            if (
                len(models[second]) < _FEWEST_SEEDS
                or first != source
                and models[first].keys() != models[second].keys()
            ):
                continue
            x, y = (np.array(list(models[name].values())) for name in (second, first))
            y = y.mean() if first == source else y
            if np.ptp(x - y) > 0:
                p = ttest_1samp(x, y).pvalue if first == source else ttest_rel(x, y).pvalue
                named = {"measure": measure, "group": group, "place": place, "model": second, "compared_with": first}
                rows.append({**named, "difference": float((x - y).mean()), "p": float(p)})
    for measure in dict.fromkeys(row["measure"] for row in rows):
        family = [row for row in rows if row["measure"] == measure]
        for row, adjusted in zip(family, false_discovery_control([row["p"] for row in family]), strict=True):
            row["p_adjusted"] = float(adjusted)
    return rows


def _by_cell(values: Values) -> dict[tuple[str, str, str, str], dict[int, float]]:
    """Return (measure, group, place, model) → seed → the mean of its values."""
    found: dict[tuple[str, str, str, str], dict[int, list[float]]] = {}
    for row in values:
        cell = row["measure"], row["group"], row["place"], row["model"]
        found.setdefault(cell, {}).setdefault(row["seed"], []).append(row["value"])
    return {cell: {seed: float(np.mean(of[seed])) for seed in sorted(of)} for cell, of in found.items()}


def _regrouped(cells: Mapping[tuple[str, str, str, str], dict[int, float]]) -> dict[tuple[str, str, str], dict]:
    found: dict[tuple[str, str, str], dict[str, dict[int, float]]] = {}
    for (measure, group, place, model), seeds in cells.items():
        found.setdefault((measure, group, place), {})[model] = seeds
    return found
