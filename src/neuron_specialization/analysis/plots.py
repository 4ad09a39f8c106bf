"""Figures of a comparison, all computed from its rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .comparison import REFERENCE, interference
from .figures import COLORS, MARKERS, panels, save, single
from .statistics import hierarchical_bootstrap, paired_differences

_LABELS = {
    "loss": f"test loss minus that of {REFERENCE} (nats per token; left is better)",
    "chrf++": f"chrF++ minus that of {REFERENCE} (right is better)",
}


def plot_differences(rows: Sequence[Mapping[str, Any]], path: str | Path, score: str = "loss") -> Path:
    """Draw each method's "loss" or "chrf++" minus that of joint fine-tuning: a dot per direction, the mean with its
    interval.

    Dots are averages over seeds; the interval is that of `hierarchical_bootstrap`.
    """
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != REFERENCE]
    figure, axes = single(height=1.2 + 0.32 * len(methods))
    for place, method in enumerate(methods):
        differences, _, directions = paired_differences(rows, method, REFERENCE, score)
        interval = hierarchical_bootstrap(differences)
        axes.plot(differences.mean(0), [place] * len(directions), "o", color="0.7", markersize=3)
        axes.plot([interval["low"], interval["high"]], [place, place], "-", color="C0", linewidth=2)
        axes.plot(interval["mean"], place, "o", color="C0", markersize=5)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set_xlabel(_LABELS[score])
    return save(figure, path)


def plot_interference(rows: Sequence[Mapping[str, Any]], methods: Sequence[str], path: str | Path) -> Path:
    """Draw, per direction, each method's difference from joint fine-tuning against the interference measured there."""
    figure, axes = single(height=4)
    for i, method in enumerate(methods):
        points = interference(rows, method)
        across, up = ([point[key] for point in points] for key in ("interference", "difference"))
        axes.plot(across, up, "os^Dv"[i % 5], color=f"C{i}", label=method, markersize=5)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_xlabel(f"interference: loss of {REFERENCE} minus that of the bilingual model")
    axes.set_ylabel(f"loss minus that of {REFERENCE} (below 0 is better)")
    axes.legend()
    return save(figure, path)


def plot_sweep(
    rows: Sequence[Mapping[str, Any]], sweep: Sequence[Mapping[str, Any]], knob: str, path: str | Path
) -> Path:
    """Draw the difference from joint fine-tuning over the values of a knob, a line with its intervals per method.

    Args:
        rows: of the comparison, with joint fine-tuning among them.
        sweep: what `sweep_table` made of them.
        knob: the one to draw.
        path: of the figure.
    """
    figure, axes = single(height=3.2)
    lines = [line for line in sweep if line["knob"] == knob]
    for i, method in enumerate(dict.fromkeys(line["method"] for line in lines)):
        points = [line for line in lines if line["method"] == method]
        of = [hierarchical_bootstrap(paired_differences(rows, line["stage"], REFERENCE, "loss")[0]) for line in points]
        errors = [[each["mean"] - each["low"] for each in of], [each["high"] - each["mean"] for each in of]]
        values, means = [float(line["value"]) for line in points], [each["mean"] for each in of]
        axes.errorbar(
            values, means, errors, fmt="o-", color=COLORS[i % len(COLORS)], markersize=4, capsize=2, label=method
        )
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_xlabel(knob)
    axes.set_ylabel(f"loss minus that of {REFERENCE}")
    axes.legend()
    return save(figure, path)


def plot_interference_of_sizes(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], methods: Sequence[str], path: str | Path
) -> Path:
    """Draw, over models of several sizes, what methods change over joint fine-tuning against measured interference.

    Args:
        rows: size → rows of its comparison, with "bilingual" and joint fine-tuning among them.
        methods: a panel for each, such as a method and its control; the panels share their axes.
        path: of the figure.
    """
    figure, (row,) = panels(1, len(methods), 7, 3.6)
    for axes in row[1:]:
        axes.sharex(row[0])
        axes.sharey(row[0])
    for method, axes in zip(methods, row, strict=True):
        for i, (size, of) in enumerate(rows.items()):
            if any(row["method"] == method for row in of):
                points = interference(of, method)
                across, up = ([point[key] for point in points] for key in ("interference", "difference"))
                axes.plot(
                    across, up, MARKERS[i % len(MARKERS)], color=COLORS[i % len(COLORS)], label=size, markersize=5
                )
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.set_title(method)
    row[0].set_ylabel(f"loss minus that of {REFERENCE} (below 0 is better)")
    figure.supxlabel(f"interference: loss of {REFERENCE} minus that of the bilingual model (nats per token)")
    row[0].legend()
    return save(figure, path)
