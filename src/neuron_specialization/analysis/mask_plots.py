"""Figures of what masks and gradients say about language pairs. Every point is a number of the rows given."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..neurons.ffn import STACKS
from .figures import COLORS, MARKERS, layer_ticks, panels, save, visible

if TYPE_CHECKING:
    from .overlap import Overlap

Rows = Sequence[Mapping[str, Any]]
_SHOWN_PAIRS = 60
_LOWEST_RATIO = 1 / 16  # of activity on a tag, in figures: the logarithm of none has no mean
_MOST_NUMBERS = 8  # languages, above which cells are too small for numbers


def plot_pairs(overlap: Mapping[str, Mapping[str, Mapping[str, float]]], path: str | Path) -> Path:
    """Draw one heatmap per stack of the overlap of every two pairs, the means over blocks of `mean_overlap`."""
    pairs = list(next(iter(overlap.values())))[:_SHOWN_PAIRS]
    side = max(2.5, 0.25 * len(pairs))
    figure, axes = panels(1, len(overlap), len(overlap) * (side + 0.8), side + 0.5)
    values = {stack: np.array([[of[a][b] for b in pairs] for a in pairs]) for stack, of in overlap.items()}
    low = min(float(each.min()) for each in values.values())
    image = None
    for each, (stack, matrix) in zip(axes.flat, values.items(), strict=True):
        image = each.imshow(matrix, cmap="cividis", vmin=low, vmax=1)
        each.set_title(f"{stack}, mean over layers", fontsize=10)
        each.set_xticks(range(len(pairs)), pairs, rotation=90, fontsize=8)
        each.set_yticks(range(len(pairs)), pairs, fontsize=8)
        if len(pairs) <= _MOST_NUMBERS:
            _write_numbers(each, matrix, light=matrix < (low + 1) / 2)
    figure.colorbar(image, ax=axes, label="IoU of the pairs' neurons", shrink=0.8)
    return save(figure, path)


def plot_overlap(overlap: "Overlap", families: Sequence[str], path: str | Path) -> Path:
    """Draw one heatmap of IoU per layer, languages ordered by family, with lines between families."""
    order = sorted(range(len(families)), key=lambda i: (list(families).index(families[i]), i))
    names = [overlap.languages[i] for i in order]
    borders = [i for i in range(1, len(order)) if families[order[i]] != families[order[i - 1]]]
    n, layers = len(names), len(overlap.blocks)
    columns = min(layers, 3)
    side = max(2.2, 0.28 * n)
    figure, axes = panels(-(-layers // columns), columns, columns * side + 1, -(-layers // columns) * (side + 0.3))
    low = float(overlap.iou.min())
    image = None
    for layer, each in enumerate(axes.flat):
        if layer >= layers:
            each.set_visible(False)
            continue
        values = overlap.iou[layer][np.ix_(order, order)]
        image = each.imshow(values, cmap="cividis", vmin=low, vmax=1)
        each.set_title(f"{overlap.stack} layer {layer}", fontsize=10)
        each.set_xticks(range(n), names, rotation=90, fontsize=8)
        each.set_yticks(range(n), names, fontsize=8)
        each.spines[:].set_visible(False)
        for border in borders:
            each.axhline(border - 0.5, color="white", linewidth=1.5)
            each.axvline(border - 0.5, color="white", linewidth=1.5)
        if n <= _MOST_NUMBERS:
            _write_numbers(each, values, light=values < (low + 1) / 2)
    figure.colorbar(image, ax=axes, label="IoU of specialized neurons", shrink=0.8)
    return save(figure, path)


def plot_depth(rows: Rows, path: str | Path) -> Path:
    """Draw, over depth, the IoU within and across families and its rank correlation with the distance of languages.

    Args:
        rows: those of "overlap_rows", with the name of their "masks". A correlation is filled where its
            corrected p is below 0.05, hollow elsewhere, and left out where there are too few languages to test.
        path: .svg file.
    """
    stacks = [stack for stack in STACKS if any(row["stack"] == stack for row in rows)]
    figure, axes = panels(2, len(stacks), 3.6 * len(stacks) + 0.6, 5.6)
    for column, stack in enumerate(stacks):
        upper, lower = axes[:, column]
        for i, (name, part) in enumerate(_groups([row for row in rows if row["stack"] == stack], "masks").items()):
            layers = [row["layer"] for row in part]
            color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
            for kind, line in (("within", "-"), ("across", "--")):
                if part[0].get(kind) is not None:
                    style = {"color": color, "linestyle": line, "marker": marker, "markersize": 4}
                    upper.plot(layers, [row[kind] for row in part], label=f"{visible(name)}, {kind} families", **style)
            if "within" not in part[0]:
                upper.plot(layers, [row["iou"] for row in part], color=color, marker=marker, label=visible(name))
            tested = [row for row in part if row["p"] is not None]  # of a few languages any order is likely
            lower.plot([row["layer"] for row in tested], [row["rho"] for row in tested], color=color, linewidth=1)
            for row in tested:
                fill = color if row["p"] < 0.05 else "white"
                lower.plot(row["layer"], row["rho"], marker, color=color, markerfacecolor=fill, markersize=6)
        upper.set_title(f"{stack}: {'into' if stack == 'encoder' else 'out of'} the pivot", fontsize=10)
        upper.set_ylim(0, 1)
        lower.set_ylim(-1, 1)
        lower.axhline(0, color="0.3", linewidth=0.8)
        lower.set_xlabel("layer")
        for each in (upper, lower):
            layer_ticks(each)
    axes[0, 0].set_ylabel("IoU of specialized neurons")
    axes[1, 0].set_ylabel("Spearman's ρ with distance")
    axes[0, -1].legend(fontsize=7)
    return save(figure, path)


def plot_agreement(rows: Rows, path: str | Path) -> Path:
    """Draw the agreement of masks over depth: solid with the pair's own, dashed with others', dotted by chance.

    Args:
        rows: those of "mask_agreement", with the name of their "masks".
        path: .svg file.
    """
    figure, axes = panels(1, 2, 8.4, 3.8)
    for each, stack in zip(axes[0], STACKS, strict=True):
        for i, (name, part) in enumerate(_groups([row for row in rows if row["stack"] == stack], "masks").items()):
            layers, style = [row["layer"] for row in part], {"color": COLORS[i % 7], "marker": MARKERS[i % 7]}
            each.plot(layers, [row["own"] for row in part], "-", markersize=5, label=visible(name), **style)
            if part[0]["others"] is not None:
                each.plot(layers, [row["others"] for row in part], "--", markersize=3, **style)
            each.plot(layers, [row["chance"] for row in part], ":", color=COLORS[i % 7], linewidth=1)
        layer_ticks(each)
        each.set_title(stack, fontsize=10)
        each.set_xlabel("layer")
        each.set_ylim(0, 1)
    axes[0, 0].set_ylabel("IoU with the original masks")
    for line, label in (("-", "of the same pair"), ("--", "of other pairs"), (":", "by chance")):
        axes[0, 1].plot([], [], line, color="0.4", label=label)
    figure.legend(*_merged(axes[0]), loc="outside right center", fontsize=8, frameon=False)
    return save(figure, path)


def plot_gradients(rows: Rows, relations: Sequence[str], path: str | Path) -> Path:
    """Draw the cosines of gradients over depth, a column per scope of weights: solid dense, dashed under masks.

    Args:
        rows: those of "gradient_rows", with "scope" and "model" ("dense" or "masked").
        relations: kinds of pairs of directions to draw.
        path: .svg file.
    """
    scopes = list(dict.fromkeys(row["scope"] for row in rows))
    figure, axes = panels(1, len(scopes), 4 * len(scopes) + 1.6, 3.8)
    for each, scope in zip(axes[0], scopes, strict=True):
        for model, line in (("dense", "-"), ("masked", "--")):
            part = [row for row in rows if row["scope"] == scope and row["model"] == model]
            for i, kind in enumerate(kind for kind in relations if part and kind in part[0]):
                style = {"color": COLORS[i], "linestyle": line, "marker": MARKERS[i], "markersize": 4}
                each.plot([row[kind] for row in part], label=f"{kind}, {model}", **style)
            if part:
                each.set_xticks(range(len(part)), [f"{row['stack'][:3]} {row['layer']}" for row in part], fontsize=8)
        each.axhline(0, color="0.3", linewidth=0.8)
        each.set_title({"up": "up-projection", "block": "whole FFN block"}[scope], fontsize=10)
    axes[0, 0].set_ylabel("cosine of two directions' gradients")
    figure.legend(*_merged(axes[0]), loc="outside right center", fontsize=8, frameon=False)
    return save(figure, path)


def plot_tags(rows: Rows, tags: Sequence[str], path: str | Path) -> Path:
    """Draw, per tag and layer, how much more of their activity specific neurons have there than shared ones (log2).

    Args:
        rows: those of "tag_rows"; the mean over pairs is drawn, in which no ratio counts as less than a sixteenth:
            that of neurons that never fire has no logarithm. White: none was measured.
        tags: names of the tags, top to bottom.
        path: .svg file.
    """
    figure, axes = panels(1, 2, 7.5, max(2.8, 1.4 + 0.26 * len(tags)))
    tables = [_log_ratios([row for row in rows if row["stack"] == stack], tags) for stack in STACKS]
    largest = max(float(np.nanmax(np.abs(table), initial=0.1)) for table in tables)
    image = None
    for each, stack, table in zip(axes[0], STACKS, tables, strict=True):
        image = each.imshow(table, cmap="PuOr", vmin=-largest, vmax=largest, aspect="auto")
        each.set_xticks(range(table.shape[1]), range(table.shape[1]))
        each.set_yticks(range(len(tags)), tags, fontsize=8)
        each.set_xlabel("layer")
        each.set_title(stack, fontsize=10)
        each.spines[:].set_visible(False)
        _write_numbers(each, table, light=np.abs(table) > 0.6 * largest)
    figure.colorbar(image, ax=axes, label="log2(specific / shared)")
    return save(figure, path)


def _log_ratios(rows: Rows, tags: Sequence[str]) -> np.ndarray:
    """Return the mean over pairs of log2 ratios: float64 [tags, layers], NaN where there is none."""
    layers = 1 + max((row["layer"] for row in rows), default=0)
    table = np.full((len(tags), layers), np.nan)
    for i, tag in enumerate(tags):
        for layer in range(layers):
            ratios = [row["ratios"].get(tag) for row in rows if row["layer"] == layer]
            measured = [max(ratio, _LOWEST_RATIO) for ratio in ratios if ratio is not None]
            if measured:
                table[i, layer] = np.log2(measured).mean()
    return table


def _write_numbers(axes: Any, values: np.ndarray, light: np.ndarray) -> None:
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "white" if light[i, j] else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)


def _groups(rows: Rows, key: str) -> dict[str, list[Mapping[str, Any]]]:
    return {name: [row for row in rows if row[key] == name] for name in dict.fromkeys(row[key] for row in rows)}


def _merged(axes: Any) -> tuple[list[Any], list[str]]:
    """Return the handles and labels of several panels, each label once."""
    found: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
