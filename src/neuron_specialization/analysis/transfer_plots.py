"""The figure of cross-lingual transfer: what each model gains over the source model, by task and language."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from .figures import COLORS, MARKERS, panels, save, turned
from .seeds import Values


def plot_transfer(languages: Values, source: str, apart: Sequence[str], path: str | Path) -> Path:
    """Draw accuracy minus that of the source model: a panel per mode and task, a mark per language and model.

    Bars are standard deviations over the seeds of a model, of which the source has one.

    Args:
        languages: rows of `seeds.summarize`, with the task as "measure", the mode as "group", the language as "place".
        source: name of the model to subtract.
        apart: languages that stand last, behind a line.
        path: of the figure.
    """
    columns = ("measure", "group", "model")
    tasks, modes, models = (list(dict.fromkeys(row[name] for row in languages)) for name in columns)
    models.remove(source)
    figure, axes = panels(len(tasks), len(modes), 1 + 6 * len(modes), 0.8 + 2.2 * len(tasks))
    for (mode, task), axis in zip(product(modes, tasks), axes.T.flat, strict=True):
        of = {(row["model"], row["place"]): row for row in languages if (row["measure"], row["group"]) == (task, mode)}
        codes = list(dict.fromkeys(place for _, place in of))
        codes = [code for code in codes if code not in apart] + [code for code in codes if code in apart]
        for k, model in enumerate(models):
            means = [of[model, code]["mean"] - of[source, code]["mean"] for code in codes]
            spread = [of[model, code]["deviation"] or 0 for code in codes]
            places = np.arange(len(codes)) + (k - (len(models) - 1) / 2) * 0.7 / len(models)
            style = {"color": COLORS[k % len(COLORS)], "fmt": MARKERS[k % len(MARKERS)], "markersize": 4}
            axis.errorbar(places, means, yerr=spread, capsize=2, label=model, **style)
        axis.axhline(0, color="0.3", linewidth=0.8)
        if set(codes) & set(apart):
            axis.axvline(sum(code not in apart for code in codes) - 0.5, color="0.7", linewidth=0.8)
        axis.set_xticks(range(len(codes)), codes, **turned(codes, 80))
        axis.set_title(f"{task}, {mode}".replace("_", " "), fontsize=9)
    figure.supylabel(f"accuracy minus that of {source} (points)", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return save(figure, path)
