"""What all figures share: sizes, colors that color-blind people tell apart, files."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..neurons.extras import install

# Okabe and Ito (2008), without yellow, which is faint on white
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "os^Dvp*"


def can_draw() -> bool:
    """Whether what draws figures and tests differences is installed."""
    return all(importlib.util.find_spec(name) for name in ("matplotlib", "scipy"))


def check_figures() -> None:
    """Raise ImportError, before anything is measured, unless figures can be drawn and differences tested."""
    if not can_draw():
        raise ImportError(f"Figures and tests of what this recipe measures need {install('report')}.")


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """Return a figure of that size in inches and its axes [rows, columns]."""
    import matplotlib  # an optional dependency
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "neuron-specialization"  # the same rows give the same file
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def turned(labels: Sequence[str], room: int) -> dict[str, Any]:
    """Return how `set_xticks` writes labels beside each other: upright where there is no room for so many letters."""
    return {"rotation": 90} if sum(map(len, labels)) + len(labels) > room else {}


def layer_ticks(axes: Any) -> None:
    """Mark layers on the x axis: whole numbers, and no more of them than can be read."""
    from matplotlib.ticker import MaxNLocator  # an optional dependency

    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))


def visible(text: str) -> str:
    """Return text that matplotlib draws as it is: no formula, and no legend entry that it hides."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def single(height: float) -> tuple[Any, Any]:
    """Return a figure of one panel, 7 inches wide, and its axes."""
    figure, axes = panels(1, 1, 7, height)
    return figure, axes[0, 0]


def save(figure: Any, path: str | Path) -> Path:
    """Write a figure in the format that its suffix names, and a .png of the same name beside an .svg."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        figure.savefig(path, metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=150)
    return path
