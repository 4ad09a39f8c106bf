"""What sequential transfer keeps and loses, from the scores of every language pair after every step.

`R[i][j]` is the score on pair j after step i of T, in the order in which pairs were trained; step 0 is the model
before the first pair. Definitions:

- diagonal   R[j][j], right after training on j; final: R[T][j]
- forgetting of j < T         max over 1 <= i < T of R[i][j], minus R[T][j]
- backward transfer to j < T  R[T][j] - R[j][j]
- forward transfer to j       R[j][j] - bilingual_j, a model of that pair alone after as many updates on it; and
- zero-shot of j              R[j-1][j], before training on j
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]


def score_matrix(rows: Rows, order: str, score: str = "bleu", method: str = "sequential", seed: int = 0) -> np.ndarray:
    """Return R: float64 [T + 1, T], NaN for steps that have not been run.

    Args:
        rows: one per stage and direction: "method", "order" (the pairs trained so far, joined by "/"; empty for the
            model before the first), "seed", "direction" and scores.
        order: the pairs in the order of training, joined by "/".
        score: name of the score.
        method: "sequential" or "masks".
        seed: of the run.
    """
    pairs = order.split("/")
    found = {
        (row["order"], row["direction"]): row[score]
        for row in rows
        if row["seed"] == seed and row["method"] == (method if row["order"] else "pretraining")
    }
    prefixes = ["/".join(pairs[:step]) for step in range(len(pairs) + 1)]
    return np.array([[found.get((prefix, pair), np.nan) for pair in pairs] for prefix in prefixes], dtype=float)


def transfer_of(matrix: np.ndarray, bilingual: Sequence[float] | None = None) -> dict[str, Any]:
    """Return what a matrix of scores says of transfer (see above): for each pair, and averaged.

    Args:
        matrix: R, float64 [T + 1, T].
        bilingual: scores of models of one pair each, in the order of training.

    Returns:
        "diagonal", "final", "zero_shot" for every pair, "forgetting" and "backward" for all but the last (empty for a
        single pair) and, given bilingual scores, "forward"; "mean" holds their means.
    """
    steps = len(matrix) - 1
    last, earlier = matrix[-1], range(steps - 1)
    found: dict[str, Any] = {
        "diagonal": [matrix[j + 1, j] for j in range(steps)],
        "final": list(last),
        "zero_shot": [matrix[j, j] for j in range(steps)],
        "forgetting": [matrix[1:-1, j].max() - last[j] for j in earlier],
        "backward": [last[j] - matrix[j + 1, j] for j in earlier],
    }
    if bilingual is not None:
        found["forward"] = [matrix[j + 1, j] - bilingual[j] for j in range(steps)]
    found = {name: [float(value) for value in values] for name, values in found.items()}
    return {**found, "mean": {name: float(np.mean(values)) for name, values in found.items() if values}}


def transfer_table(rows: Rows, orders: Iterable[str], score: str = "bleu") -> list[dict[str, Any]]:
    """Return one table row per method, order and seed, for whatever has been run to its end.

    The joint and the bilingual models have a final score only; the diagonal and the final row stand apart, because a
    shared decoder may win the one and lose the other.
    """
    orders, table = list(orders), []
    for seed in sorted({row["seed"] for row in rows}):
        of_seed = [row for row in rows if row["seed"] == seed]
        alone = {
            method: {row["direction"]: row[score] for row in of_seed if row["method"] == method}
            for method in ("joint", "bilingual")
        }
        for method in ("sequential", "masks"):
            for order in orders:
                matrix = score_matrix(of_seed, order, score, method, seed)
                if np.isnan(matrix).any():
                    continue
                pairs = order.split("/")
                whole = alone["bilingual"].keys() >= set(pairs)
                found = transfer_of(matrix, [alone["bilingual"][pair] for pair in pairs] if whole else None)
                table.append({"method": method, "order": order, "seed": seed, **found["mean"]})
        for method, scores in alone.items():
            if orders and scores.keys() >= set(orders[0].split("/")):
                mean = float(np.mean(list(scores.values())))
                table.append({"method": method, "order": "", "seed": seed, "final": mean})
    return table


def robustness_table(rows: Rows) -> list[dict[str, Any]]:
    """Return one table row per final model and kind of noise: mean BLEU clean and noisy, and the drop.

    Args:
        rows: one per model, direction and kind: "method", "order", "seed", "noise", "bleu" and "clean bleu".
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        # the bilingual models are one model for each direction
        order = "" if row["method"] == "bilingual" else row["order"]
        groups.setdefault((row["method"], order, row["seed"], row["noise"]), []).append(row)
    table = []
    for (method, order, seed, noise), members in groups.items():
        clean, noisy = (float(np.mean([row[name] for row in members])) for name in ("clean bleu", "bleu"))
        line = {"method": method, "order": order, "seed": seed, "noise": noise, "clean": clean, "noisy": noisy}
        table.append({**line, "drop": clean - noisy})
    return table
