"""Figures of a comparison, all computed from its rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .comparison import REFERENCE, interference
from .figures import save, single
from .statistics import hierarchical_bootstrap, paired_differences


def plot_differences(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw each method's test loss minus that of joint fine-tuning: a dot per direction, the mean with its interval.

    Dots are averages over seeds; the interval is that of `hierarchical_bootstrap`.
    """
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m != REFERENCE]
    figure, axes = single(height=1.2 + 0.32 * len(methods))
    for place, method in enumerate(methods):
        differences, _, directions = paired_differences(rows, method, REFERENCE, "loss")
        interval = hierarchical_bootstrap(differences)
        axes.plot(differences.mean(0), [place] * len(directions), "o", color="0.7", markersize=3)
        axes.plot([interval["low"], interval["high"]], [place, place], "-", color="C0", linewidth=2)
        axes.plot(interval["mean"], place, "o", color="C0", markersize=5)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set_xlabel(f"test loss minus that of {REFERENCE} (nats per token; left is better)")
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
