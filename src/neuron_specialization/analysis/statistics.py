"""Is a difference between two methods more than chance? Bootstrap over directions and seeds, and over sentences."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics import CHRF
from sacrebleu.significance import PairedTest


def paired_differences(
    rows: Sequence[Mapping[str, Any]], method: str, reference: str, score: str
) -> tuple[np.ndarray, list[int], list[str]]:
    """Return method minus reference, for the seeds and directions that both have rows of.

    A reference without training has one result for all seeds: where the two share no seed, the reference's mean over
    its seeds is subtracted from every seed of the method.

    Args:
        rows: one per method, seed and direction.
        method: name of a method in them.
        reference: likewise.
        score: name of a number in each row.

    Returns:
        float64 [seeds, directions], the seeds and the directions.

    Raises:
        ValueError: if the two share no direction, or a row is missing.
    """
    of = {name: _by_seed(rows, name, score) for name in (method, reference)}
    known = [{direction for values in of[name].values() for direction in values} for name in (method, reference)]
    directions = [d for d in dict.fromkeys(row["direction"] for row in rows) if d in known[0] and d in known[1]]
    if not directions:
        raise ValueError(f"{method} and {reference} have no direction in common, so nothing can be compared.")
    shared = sorted(of[method].keys() & of[reference].keys())
    seeds = shared or sorted(of[method])
    ours = np.array([[of[method][seed].get(d, np.nan) for d in directions] for seed in seeds])
    theirs = np.array([[values.get(d, np.nan) for d in directions] for _, values in sorted(of[reference].items())])
    against = theirs[[sorted(of[reference]).index(seed) for seed in shared]] if shared else theirs.mean(0)
    differences = ours - against
    if np.isnan(differences).any():
        raise ValueError(f"{method} or {reference} lacks rows of some directions: finish their stages first.")
    return differences, seeds, directions


def hierarchical_bootstrap(
    differences: np.ndarray, draws: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> dict[str, float]:
    """Return the mean difference with its confidence interval, over new directions and new seeds.

    Directions and seeds are crossed, so each draw resamples both with replacement (the pigeonhole bootstrap; Owen,
    2007). With one seed only directions are resampled: the interval then does not cover the variation between training
    runs. Intervals over few directions or seeds are too narrow, as those of any bootstrap of so few.

    Args:
        differences: float [seeds, directions].
        draws: number of resamples.
        seed: of the resampling.
        confidence: of the percentile interval.

    Returns:
        "mean", "low", "high", and "p": the two-sided share of draws beyond zero, and at least that of a sign test in
        which all directions agree, since resampling cannot turn the sign of a few that do.
    """
    draw = np.random.default_rng(seed)
    seeds, directions = differences.shape
    weights = [draw.multinomial(n, np.full(n, 1 / n), size=draws) / n for n in (seeds, directions)]
    means = np.einsum("ds,sp,dp->d", weights[0], differences, weights[1], optimize=True)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    beyond = min((means <= 0).mean(), (means >= 0).mean())
    p = min(1.0, max(2 * beyond, 1 / draws, 2.0 ** (1 - directions)))
    return {"mean": float(differences.mean()), "low": float(low), "high": float(high), "p": float(p)}


def paired_bootstrap(
    translations: Mapping[str, Sequence[str]],
    reference_translations: Mapping[str, Sequence[str]],
    references: Mapping[str, Sequence[str]],
    samples: int = 1000,
    alpha: float = 0.05,
) -> dict[str, dict[str, Any]]:
    """Test each direction's chrF++ by sacreBLEU's paired bootstrap, with Benjamini and Hochberg's correction.

    Args:
        translations: direction → texts of a method.
        reference_translations: direction → texts of the method it is compared with.
        references: direction → reference translations.
        samples: bootstrap resamples of the test sentences.
        alpha: false discovery rate over the directions.

    Returns:
        direction → "difference" in chrF++, "p", "adjusted" p, and "significant".
    """
    from scipy.stats import false_discovery_control  # an optional dependency

    tested: dict[str, dict[str, Any]] = {}
    for pair, texts in translations.items():
        systems: Any = [("reference", list(reference_translations[pair])), ("method", list(texts))]
        test = PairedTest(systems, {"chrf++": CHRF(word_order=2)}, [list(references[pair])], "bs", samples)
        results: Any = test()[1]
        before, after = next(values for name, values in results.items() if name != "System")
        difference = after.score - before.score
        # sacreBLEU gives two systems of the same score its smallest p, by a convention for comparing one with itself
        tested[pair] = {"difference": difference, "p": after.p_value if difference else 1.0}
    adjusted = false_discovery_control([result["p"] for result in tested.values()])
    for result, p in zip(tested.values(), adjusted, strict=True):
        result |= {"adjusted": float(p), "significant": bool(p <= alpha)}
    return tested


def spread(rows: Sequence[Mapping[str, Any]], method: str, score: str) -> tuple[float, float | None]:
    """Return the mean over directions and seeds, and the standard deviation of the seeds' means, None for one seed."""
    means = [float(np.mean(list(values.values()))) for values in _by_seed(rows, method, score).values()]
    return float(np.mean(means)), float(np.std(means, ddof=1)) if len(means) > 1 else None


def reference_mean(rows: Sequence[Mapping[str, Any]], method: str, reference: str, score: str) -> float:
    """Return the reference's mean over the seeds and directions that `paired_differences` compares a method over."""
    _, seeds, directions = paired_differences(rows, method, reference, score)
    of = _by_seed(rows, reference, score)
    shared = [of[seed] for seed in seeds if seed in of] or list(of.values())
    return float(np.mean([[values[direction] for direction in directions] for values in shared]))


def _by_seed(rows: Sequence[Mapping[str, Any]], method: str, score: str) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["method"] == method:
            found.setdefault(row["seed"], {})[row["direction"]] = float(row[score])
    if not found:
        raise ValueError(f"There are no rows of {method!r}.")
    return found
