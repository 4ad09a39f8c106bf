"""What a comparison of representations reports: values per seed (see `seeds`), tables and figures of their means."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .figures import COLORS, MARKERS, panels, save
from .representations import ALL, groups_of
from .seeds import Values
from .spectrum_change import STATISTICS

SOURCE_CKA, LANGUAGE_CKA, RETRIEVAL = "CKA to the source", "CKA between languages", "retrieval"
MISALIGNED = ", misaligned"
_DECIMALS = {RETRIEVAL: 1, RETRIEVAL + MISALIGNED: 1}


def source_values(rows: Iterable[Mapping[str, Any]], seen: Sequence[str]) -> list[dict[str, Any]]:
    """Return values of rows with "model", "seed", "language", "layer", "cka" and maybe "cka_misaligned"."""
    return [
        {**_about(row), "measure": SOURCE_CKA + suffix, "group": group, "value": row[f"cka{key}"]}
        for row in rows
        for group in groups_of([row["language"]], seen)
        for key, suffix in (("", ""), ("_misaligned", MISALIGNED))
        if f"cka{key}" in row
    ]


def language_values(rows: Iterable[Mapping[str, Any]], seen: Sequence[str]) -> list[dict[str, Any]]:
    """Return values of rows of `language_similarity` with "model" and "seed"."""
    return [
        {**_about(row), "measure": measure + suffix, "group": group, "value": row[f"{name}{key}"]}
        for row in rows
        for group in groups_of(row["languages"], seen)
        for name, measure in (("cka", LANGUAGE_CKA), ("retrieval", RETRIEVAL))
        for key, suffix in (("", ""), ("_misaligned", MISALIGNED))
    ]


def spectrum_values(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return values of rows of `spectrum_changes` with "model" and "seed": logarithms of the ratios to the source."""
    return [
        {
            **{"model": row["model"], "seed": row["seed"], "place": row["type"], "group": ALL},
            **{"measure": statistic, "value": float(np.log(row["ratio"][statistic]))},
        }
        for row in rows
        for statistic in STATISTICS
    ]


def _about(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": row["model"], "seed": row["seed"], "place": f"layer {row['layer']}"}


def report_tables(summary: Values, source: str) -> dict[str, list[dict[str, Any]]]:
    """Return title → rows: of representations a column per layer, of spectra a column per model."""
    tables = {}
    for measure in dict.fromkeys(row["measure"] for row in summary):
        lines: dict[tuple[str, ...], dict[str, str]] = {}
        of_spectra = measure in STATISTICS
        for row in summary:
            if row["measure"] == measure and of_spectra and row["model"] != source:
                cell = _cell(np.exp(row["mean"]), row["deviation"] and np.exp(row["mean"]) * row["deviation"], 3)
                lines.setdefault((row["place"],), {"matrix": row["place"]})[row["model"]] = cell
            elif row["measure"] == measure and not of_spectra:
                named = {"languages": row["group"], "model": row["model"]}
                cell = _cell(row["mean"], row["deviation"], _DECIMALS.get(measure, 3))
                lines.setdefault((row["group"], row["model"]), named)[row["place"]] = cell
        if lines:
            title = f"{measure} of singular values, ratio to the source" if of_spectra else measure
            tables[title] = list(lines.values())
    return tables


def _cell(mean: float, deviation: float | None, decimals: int) -> str:
    return f"{mean:.{decimals}f}" + ("" if deviation is None else f" ± {deviation:.{decimals}f}")


def draw(summary: Values, source: str, directory: str | Path) -> list[Path]:
    """Draw CKA to the source, CKA and retrieval between languages (controls dotted), and spectra, as SVG."""
    named = {"source_cka.svg": (SOURCE_CKA,), "languages.svg": (LANGUAGE_CKA, RETRIEVAL)}
    drawn = []
    for file, measures in named.items():
        rows = [row for row in summary if row["measure"].removesuffix(MISALIGNED) in measures]
        groups = list(dict.fromkeys(row["group"] for row in rows))
        models = list(dict.fromkeys(row["model"] for row in rows))
        if not models:
            continue
        figure, axes = panels(len(measures), len(groups), 2 + 2.6 * len(groups), 0.6 + 2.4 * len(measures))
        for i, measure in enumerate(measures):
            for j, group in enumerate(groups):
                _draw_layers(axes[i, j], [row for row in rows if row["group"] == group], measure, models)
                axes[i, j].set_title(f"languages: {group}" if not i else "", fontsize=9)
            axes[i, 0].set_ylabel(measure + (" (%)" if measure == RETRIEVAL else ""))
        figure.supxlabel("encoder layer (0: embedding)", fontsize=9)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
        drawn.append(save(figure, Path(directory) / file))
    of_matrices = [row for row in summary if row["measure"] in STATISTICS and row["model"] != source]
    return [*drawn, _draw_spectra(of_matrices, Path(directory) / "spectra.svg")] if of_matrices else drawn


def _draw_layers(axes: Any, rows: Values, measure: str, models: Sequence[str]) -> None:
    for i, model in enumerate(models):
        for name, style in ((measure, "-"), (measure + MISALIGNED, ":")):
            points = [row for row in rows if row["measure"] == name and row["model"] == model]
            means, errors = [row["mean"] for row in points], [row["deviation"] or 0 for row in points]
            if points:
                axes.errorbar(
                    *(range(len(points)), means, errors),
                    **{"linestyle": style, "marker": MARKERS[i % len(MARKERS)] if style == "-" else None},
                    **{"color": COLORS[i % len(COLORS)], "markersize": 4, "capsize": 2},
                    label=model if style == "-" else None,
                )
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_spectra(rows: Values, path: Path) -> Path:
    """Draw the ratio to the source of each statistic of singular values, per type of matrix."""
    models, types = (list(dict.fromkeys(row[name] for row in rows)) for name in ("model", "place"))
    figure, axes = panels(1, len(STATISTICS), 2 + 1.9 * len(STATISTICS), 1.2 + 0.26 * len(types))
    for axis, statistic in zip(axes[0], STATISTICS, strict=True):
        for i, model in enumerate(models):
            of = {row["place"]: row for row in rows if (row["measure"], row["model"]) == (statistic, model)}
            ratios = np.exp([of[name]["mean"] for name in types])
            spread = ratios * np.array([of[name]["deviation"] or 0 for name in types])
            places = np.arange(len(types)) + (i - (len(models) - 1) / 2) * 0.7 / len(models)
            style = {"color": COLORS[i % len(COLORS)], "fmt": MARKERS[i % len(MARKERS)], "markersize": 3}
            axis.errorbar(ratios, places, xerr=spread, label=model, **style)
        axis.axvline(1, color="0.3", linewidth=0.8)
        axis.set_yticks(range(len(types)), types if axis is axes[0, 0] else [""] * len(types), fontsize=8)
        axis.set_title(statistic.replace("_", " "), fontsize=9)
        axis.invert_yaxis()
    figure.supxlabel("after training / before", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return save(figure, path)
