"""Scores of cross-lingual transfer: per language, the gap, intervals, and comparisons of models.

Test sets are translations of each other, so an item's predictions in several languages, and by several heads, are not
independent. Intervals therefore draw whole items, or whole texts where a task says which items are from one, and
comparisons of models pair them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from .transfer import CONTROLS, MAJORITY, RANDOM, Checkpoint, Predictions
from .understanding import Examples, Task

SAMPLES = 2000
ABOVE_MAJORITY = 10.0  # points that the source language must be above the most frequent label
ZERO_SHOT_ABOVE_MAJORITY = 5.0  # points that the other languages' mean must be


def score_rows(tasks: Iterable[Task], predictions: Iterable[Predictions]) -> list[dict[str, Any]]:
    """Return one row per model, task, mode, language and seed.

    "accuracy" is the share of correct units (texts, or words), "f1" the mean F1 over the labels that the test data
    has, both in percent; "items" is the number of examples.
    """
    by_name = {task.name: task for task in tasks}
    rows = []
    for found in predictions:
        for language, examples in by_name[found.task].test.items():
            truth, guess = _flat(examples), found.labels[language]
            row = {"model": found.model, "task": found.task, "mode": found.mode, "language": language}
            scores = {"accuracy": 100 * float((truth == guess).mean()), "f1": _macro_f1(truth, guess)}
            rows.append({**row, "seed": found.seed, **scores, "items": len(examples.items)})
    return rows


def _flat(examples: Examples) -> np.ndarray:
    return np.concatenate([np.array(labels) for labels in examples.labels])


def _macro_f1(truth: np.ndarray, guess: np.ndarray) -> float:
    classes = np.unique(truth)
    both = np.array([((truth == c) & (guess == c)).sum() for c in classes])
    either = np.array([(truth == c).sum() + (guess == c).sum() for c in classes])
    return 100 * float((2 * both / either).mean())


@dataclass(frozen=True)
class ItemCounts:
    """Correct units per item, of all heads of one model on one task.

    Attributes:
        languages: the source language first.
        correct: mean over seeds, float64 [languages, items]; 0 where a language lacks an item.
        total: units, int64 [languages, items].
        by_seed: accuracy per head in percent, float64 [seeds, languages].
        texts: number of the running text that each item is from, int64 [items]; each is its own where none is known.
    """

    languages: list[str]
    correct: np.ndarray
    total: np.ndarray
    by_seed: np.ndarray
    texts: np.ndarray

    @classmethod
    def of(cls, task: Task, predictions: Sequence[Predictions]) -> "ItemCounts":
        """Count; the items are those of the source language."""
        numbers = {item: i for i, item in enumerate(task.test[task.source].items)}
        shape = len(task.test), len(numbers)
        correct, total = np.zeros((len(predictions), *shape)), np.zeros(shape, np.int64)
        for row, (language, examples) in enumerate(task.test.items()):
            sizes = [len(labels) for labels in examples.labels]
            index = np.repeat([numbers[item] for item in examples.items], sizes)
            total[row] = np.bincount(index, minlength=len(numbers))
            for seed, found in enumerate(predictions):
                right = _flat(examples) == found.labels[language]
                correct[seed, row] = np.bincount(index, right, minlength=len(numbers))
        by_seed = 100 * correct.sum(2) / total.sum(1)
        names = [item.partition(task.text_end)[0] if task.text_end else item for item in numbers]
        texts = np.unique(names, return_inverse=True)[1]
        return cls(list(task.test), correct.mean(0), total, by_seed, texts)

    def draw(self, samples: int) -> np.ndarray:
        """Return how often each item counts in the whole data and in bootstrap samples, [1 + samples, items].

        What is drawn are texts with all their items, the same in every call.
        """
        number = self.texts.max() + 1
        drawn = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), samples)
        return np.vstack([np.ones(len(self.texts)), drawn[:, self.texts]])

    def statistics(self, weights: np.ndarray, others: Sequence[str]) -> dict[str, np.ndarray]:
        """Return "source", "zero_shot" and "gap" in percent, each [samples].

        The gap of a language is measured on the items it has: the source language's accuracy on them minus its own.

        Args:
            weights: how often each item counts, [samples, items].
            others: languages that the zero-shot mean and the gap are over.
        """
        rows = [self.languages.index(code) for code in others]
        present = self.total[rows] > 0
        own = (weights @ self.correct[rows].T) / (weights @ self.total[rows].T)
        source = (weights @ (present * self.correct[0]).T) / (weights @ (present * self.total[0]).T)
        return {
            "source": 100 * (weights @ self.correct[0]) / (weights @ self.total[0]),
            "zero_shot": 100 * own.mean(1),
            "gap": 100 * (source - own).mean(1),
        }

    def text_scores(self, others: Sequence[str]) -> np.ndarray:
        """Return values per text, float64 [texts], whose sum is the zero-shot mean in percent."""
        rows = [self.languages.index(code) for code in others]
        return 100 * np.bincount(self.texts, (self.correct[rows] / self.total[rows].sum(1, keepdims=True)).mean(0))


def summarize(
    tasks: Sequence[Task], predictions: Sequence[Predictions], apart: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return one row per task, mode and model: source language, mean of the others, gap, 95 % intervals.

    Languages apart (such as low-resource ones) are in none of the means; their own mean is "apart". "seed_deviation"
    is the standard deviation of the zero-shot mean over heads.
    """
    rows = []
    for task, mode, model, counts in _cells(tasks, predictions):
        others, low = _groups(task, apart)
        row: dict[str, Any] = {"task": task.name, "mode": mode, "model": model}
        for name, values in counts.statistics(counts.draw(SAMPLES), others).items():
            row[name] = float(values[0])
            row[f"{name}_interval"] = np.nanpercentile(values[1:], [2.5, 97.5]).round(2).tolist()
        columns = [counts.languages.index(code) for code in others]
        means = counts.by_seed[:, columns].mean(1)
        row["seed_deviation"] = float(means.std(ddof=1)) if len(means) > 1 else None
        row["apart"] = float(counts.by_seed[:, [counts.languages.index(code) for code in low]].mean()) if low else None
        rows.append(row)
    return rows


def condition_values(summary: Iterable[Mapping[str, Any]], checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """Return values per checkpoint, of conditions with several checkpoints and of the models with one.

    Args:
        summary: what `summarize` returns.
        checkpoints: of the models in it; others, such as controls, are left out.

    Returns:
        One row per "measure" ("source", "zero_shot", "gap" and "apart"), "group" (the mode), "place" (the task),
        "model" (the condition) and "seed", with its "value".
    """
    of = {each.label: each for each in checkpoints}
    return [
        {
            **{"measure": measure, "group": row["mode"], "place": row["task"]},
            **{"model": of[row["model"]].name, "seed": of[row["model"]].seed, "value": row[measure]},
        }
        for row in summary
        for measure in ("source", "zero_shot", "gap", "apart")
        if row["model"] in of and row[measure] is not None
    ]


def language_values(rows: Iterable[Mapping[str, Any]], checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """Return accuracy per checkpoint and language as such values: "measure" is the task, "place" the language.

    Args:
        rows: what `score_rows` returns; "value" is their accuracy in percent.
        checkpoints: of the models in it; others, such as controls, are left out.
    """
    of = {each.label: each for each in checkpoints}
    return [
        {
            **{"measure": row["task"], "group": row["mode"], "place": row["language"]},
            **{"model": of[row["model"]].name, "seed": of[row["model"]].seed, "value": row["accuracy"]},
        }
        for row in rows
        if row["model"] in of
    ]


def _groups(task: Task, apart: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the target languages that the means are over, and those reported apart."""
    others = [code for code in task.test if code != task.source and code not in apart]
    return others, [code for code in task.test if code in apart]


def _cells(tasks: Sequence[Task], predictions: Sequence[Predictions]) -> Iterable[tuple[Task, str, str, ItemCounts]]:
    grouped: dict[tuple[str, str, str], list[Predictions]] = {}
    for found in predictions:
        grouped.setdefault((found.task, found.mode, found.model), []).append(found)
    for task in tasks:
        for (name, mode, model), heads in grouped.items():
            if name == task.name:
                yield task, mode, model, ItemCounts.of(task, heads)


def uninformative(summary: Sequence[Mapping[str, Any]], source_model: str) -> list[dict[str, str]]:
    """Return tasks and modes from which nothing can be concluded about transfer, with the reason.

    These are those where the source model is less than 10 points above the most frequent label in the source language,
    or less than 5 in the mean of the others.
    """
    majority = {row["task"]: row for row in summary if row["model"] == MAJORITY}
    found = []
    for row in summary:
        if row["model"] != source_model:
            continue
        base = majority[row["task"]]
        for what, least in (("source", ABOVE_MAJORITY), ("zero_shot", ZERO_SHOT_ABOVE_MAJORITY)):
            above = row[what] - base[what]
            if above < least:
                name = "the source language" if what == "source" else "the mean of the other languages"
                reason = f"{name} is {above:.1f} points above the most frequent label; expected {least:.0f}"
                found.append({"task": row["task"], "mode": row["mode"], "reason": reason})
                break
    return found


def by_condition(predictions: Iterable[Predictions], checkpoints: Sequence[Checkpoint]) -> list[Predictions]:
    """Return predictions named after their model's condition: the heads of all its checkpoints become its heads."""
    names = {each.label: each.name for each in checkpoints}
    return [replace(found, model=names.get(found.model, found.model)) for found in predictions]


def compare(
    tasks: Sequence[Task],
    predictions: Sequence[Predictions],
    source_model: str,
    apart: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return the difference of zero-shot means, for every two models of a task and mode.

    "languages" says what the mean is over: "zero_shot", or the languages "apart" if there are any. "interval" (95 %)
    is of a bootstrap over items, or over texts where the task knows them. "p" is of a two-sided permutation test that
    swaps the two models' predictions of an item, or of a text, with all its languages and heads; "p_adjusted" controls
    the false discovery rate (Benjamini-Hochberg) over all rows. The untrained encoder is compared with the source
    model only, and these rows are adjusted by themselves.
    """
    from scipy.stats import false_discovery_control  # an optional dependency

    cells = {(task.name, mode, model): (task, counts) for task, mode, model, counts in _cells(tasks, predictions)}
    rows: list[dict[str, Any]] = []
    for task_name, mode in dict.fromkeys(cell[:2] for cell in cells):
        known = [model for *cell, model in cells if tuple(cell) == (task_name, mode)]
        trained = sorted(set(known) - set(CONTROLS), key=lambda name: (name != source_model, known.index(name)))
        pairs = [*combinations(trained, 2), *((source_model, name) for name in known if name == RANDOM)]
        for first, second in pairs:
            (task, before), (_, after) = cells[task_name, mode, first], cells[task_name, mode, second]
            for group, languages in zip(("zero_shot", "apart"), _groups(task, apart), strict=True):
                if languages:
                    names = {"task": task_name, "mode": mode, "languages": group, "model": second}
                    rows.append({**names, "compared_with": first, **_difference(after, before, languages)})
    for family in ([row for row in rows if (row["model"] == RANDOM) == control] for control in (False, True)):
        adjusted = false_discovery_control([row["p"] for row in family]) if family else []
        for row, value in zip(family, adjusted, strict=True):
            row["p_adjusted"] = float(value)
    return rows


def _difference(x: ItemCounts, y: ItemCounts, languages: Sequence[str]) -> dict[str, Any]:
    """Return "difference" of the means over languages, its "interval", and "p"."""
    weights = x.draw(SAMPLES)
    drawn = x.statistics(weights, languages)["zero_shot"] - y.statistics(weights, languages)["zero_shot"]
    interval = np.nanpercentile(drawn[1:], [2.5, 97.5]).round(2).tolist()
    p = _swap_test(x.text_scores(languages), y.text_scores(languages))
    return {"difference": float(drawn[0]), "interval": interval, "p": p}


def _swap_test(x: np.ndarray, y: np.ndarray) -> float:
    """Return p of the difference between the sums of two models' scores per text, float64 [texts]."""
    from scipy.stats import permutation_test  # an optional dependency

    tested = permutation_test(
        [x, y],
        lambda x, y, axis: (x - y).sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        batch=500,
        rng=np.random.default_rng(0),
    )
    return float(tested.pvalue)


def language_table(task: Task, rows: Sequence[Mapping[str, Any]], mode: str) -> list[dict[str, Any]]:
    """Return one row per language and one column per model: accuracy, mean over heads ± standard deviation."""
    lines = []
    for language, examples in task.test.items():
        line: dict[str, Any] = {"language": language, "items": len(examples.items)}
        for row in rows:
            if row["task"] == task.name and row["language"] == language and row["mode"] in (mode, "control"):
                line.setdefault(row["model"], []).append(row["accuracy"])
        lines.append({name: _mean_and_deviation(v) if isinstance(v, list) else v for name, v in line.items()})
    return lines


def _mean_and_deviation(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.1f}"
