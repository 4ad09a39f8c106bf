"""Figures of mass activation, forgetting and pruning, as SVG and PNG.

Gains and positive values are blue, losses and negative values orange; where lines are many, markers differ too.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .figures import COLORS, MARKERS, panels, save, single, turned, visible
from .mass_activation import MassActivation
from .mass_comparison import MassChange

BLUE, ORANGE = COLORS[:2]
Rows = Sequence[Mapping[str, Any]]
Tokens = Sequence[tuple[str, float]]


def plot_mass(mass: MassActivation, name: str, path: str | Path) -> Path:
    """Draw each unit's mass, sorted by the positive mass, with the negative mass below zero; a panel per layer."""
    layers = list(mass.credit)
    columns = min(2, len(layers))
    rows = -(-len(layers) // columns)
    figure, axes = panels(rows, columns, 7, 0.6 + 1.7 * rows)
    row = mass.names.index(name)
    for axis, layer in zip(axes.flat, layers, strict=False):
        positions = max(1, int(mass.positions[mass.stacks[layer]][row]))
        positive, negative = (side[layer][row].numpy() / positions for side in (mass.positive, mass.negative))
        order = np.argsort(-positive, kind="stable")
        units = np.arange(len(order))
        axis.fill_between(units, positive[order], step="mid", color=BLUE, linewidth=0, label="positive")
        axis.fill_between(units, -negative[order], step="mid", color=ORANGE, linewidth=0, label="negative")
        axis.axhline(0, color="0.3", linewidth=0.8)
        axis.set_title(short_name(layer), fontsize=9)
        axis.set_xlim(0, len(order) - 1)
    for axis in axes.flat[len(layers) :]:
        axis.set_visible(False)
    axes.flat[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("neurons, sorted by positive mass", fontsize=9)
    figure.supylabel("mass per position", fontsize=9)
    figure.suptitle(f"Mass of each neuron on {name}", fontsize=10)
    return save(figure, path)


def plot_alive(steps: Mapping[str, Mapping[str, tuple[int, int]]], path: str | Path, title: str = "") -> Path:
    """Draw how many units are alive and dead in each layer after each step.

    Args:
        steps: name of the step → layer → (alive, dead).
        path: of the SVG.
        title: of the figure.
    """
    layers = list(next(iter(steps.values())))
    columns = min(2, len(layers))
    rows = -(-len(layers) // columns)
    names = list(steps)
    writing = turned(names, 50 if columns > 1 else 100)
    names_take = 0.06 * max(map(len, names)) if writing else 0
    figure, axes = panels(rows, columns, 7, 0.8 + (1.5 + names_take) * rows)
    for axis, layer in zip(axes.flat, layers, strict=False):
        alive = np.array([of[layer][0] for of in steps.values()])
        dead = np.array([of[layer][1] for of in steps.values()])
        axis.bar(range(len(steps)), alive, color=BLUE, label="alive")
        axis.bar(range(len(steps)), dead, bottom=alive, color="0.85", hatch="///", edgecolor="0.6", label="dead")
        for x, value in enumerate(alive):
            axis.text(x, value / 2, str(value), ha="center", va="center", fontsize=8, color="white")
        axis.set_xticks(range(len(names)), names, fontsize=7, **writing)
        axis.set_title(short_name(layer), fontsize=9)
        axis.set_ylim(0, (alive + dead).max())
    for axis in axes.flat[len(layers) :]:
        axis.set_visible(False)
    figure.legend(
        *axes.flat[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8, frameon=False
    )
    figure.supylabel("neurons", fontsize=9)
    figure.suptitle(title, fontsize=9)
    return save(figure, path)


def plot_change(changes: Mapping[str, MassChange], path: str | Path, title: str = "") -> Path:
    """Draw, for each unit alive before and after, how far its tokens moved against how many it gained or lost.

    Args:
        changes: layer → its change.
        path: of the SVG.
        title: of the figure.
    """
    columns = min(2, len(changes))
    rows = -(-len(changes) // columns)
    figure, axes = panels(rows, columns, 7, 0.6 + 2.4 * rows)
    for axis, (layer, change) in zip(axes.flat, changes.items(), strict=False):
        shared = change.shared.numpy()
        axis.plot(change.length.numpy()[shared], change.hellinger.numpy()[shared], "o", color=BLUE, ms=3, alpha=0.6)
        axis.axvline(0, color="0.5", linewidth=0.8)
        axis.set_ylim(-0.03, 1.03)
        counts = [int(of.sum()) for of in (change.shared, change.only_before, change.only_after)]
        about = "{} in both, {} only before, {} only after".format(*counts)
        axis.set_title(f"{short_name(layer)}\n{about}", fontsize=8)
    for axis in axes.flat[len(changes) :]:
        axis.set_visible(False)
    figure.supxlabel("distinct tokens gained (right) or lost (left)", fontsize=9)
    figure.supylabel("Hellinger distance of token distributions", fontsize=9)
    figure.suptitle(title, fontsize=9)
    return save(figure, path)


def plot_top_tokens(units: Mapping[str, tuple[Tokens, Tokens]], path: str | Path, title: str = "") -> Path:
    """Draw the top tokens of units with their shares of the unit's credit, before and after, side by side.

    Args:
        units: name → ((token, share), ...) before, and after.
        path: of the SVG.
        title: of the figure.
    """
    most = max(len(side) for both in units.values() for side in both)
    figure, axes = panels(len(units), 2, 7, 0.5 + len(units) * (0.5 + 0.18 * most))
    widest = max((share for both in units.values() for side in both for _, share in side), default=1.0)
    for row, (name, both) in zip(axes, units.items(), strict=True):
        for axis, side, when, color in zip(row, both, ("before", "after"), (ORANGE, BLUE), strict=True):
            axis.barh(range(len(side)), [share for _, share in side], color=color, height=0.7)
            axis.set_yticks(range(len(side)), [_visible(token) for token, _ in side], fontsize=8)
            axis.set_ylim(most - 0.5, -0.5)
            axis.set_xlim(0, widest * 1.05)
            axis.set_title(f"{name}, {when}" + ("" if side else ": dead"), fontsize=8)
    figure.supxlabel("share of the neuron's credit", fontsize=9)
    figure.suptitle(title, fontsize=9)
    return save(figure, path)


def plot_tag_shares(rows: Rows, path: str | Path) -> Path:
    """Draw what share of the credit falls to each part of speech, and of the tokens: a bar per tag and row.

    Args:
        rows: of `mass_report.tag_table`.
        path: of the SVG.
    """
    figure, axes = single(3.2)
    tags = [name for name in rows[0] if name != "model"]
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        places = np.arange(len(tags)) + (i - (len(rows) - 1) / 2) * width
        axes.bar(places, [row[tag] for tag in tags], width, color=COLORS[i % len(COLORS)], label=row["model"])
    axes.set_xticks(range(len(tags)), tags, rotation=60, fontsize=8)
    axes.set_ylabel("share of the credit, or of tokens")
    axes.legend(frameon=False, fontsize=8)
    return save(figure, path)


def plot_matrix(matrices: Mapping[tuple[str, str], np.ndarray], path: str | Path, label: str) -> Path:
    """Draw matrices of scores, a row per step and a column per pair; the diagonal, just trained, is framed.

    Args:
        matrices: method and order, such as "en-de/en-fr" → float64 [steps + 1, pairs], the first row before any step.
        path: of the SVG.
        label: what the scores are.
    """
    columns = min(2, len(matrices))
    rows = -(-len(matrices) // columns)
    figure, axes = panels(rows, columns, 7, 0.7 + 2.5 * rows)
    highest = max(float(np.nanmax(matrix)) for matrix in matrices.values())
    image: Any = None
    for axis, ((method, order), matrix) in zip(axes.flat, matrices.items(), strict=False):
        pairs = order.split("/")
        image = axis.imshow(matrix, cmap="cividis", vmin=0, vmax=highest, aspect="auto")
        for (i, j), value in np.ndenumerate(matrix):
            dark = value < 0.6 * highest
            axis.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=9, color="white" if dark else "black")
        for j in range(len(pairs)):
            frame = {"fill": False, "edgecolor": ORANGE, "linewidth": 2.0}
            axis.add_patch(_rectangle((j - 0.48, j + 0.52), 0.96, 0.96, **frame))
        axis.set_xticks(range(len(pairs)), pairs, fontsize=8, **turned(pairs, 40 if columns > 1 else 80))
        axis.set_yticks(range(len(pairs) + 1), ["before", *(f"+ {pair}" for pair in pairs)], fontsize=8)
        axis.tick_params(length=0)
        axis.set_title(textwrap.fill(f"{method}: {' → '.join(pairs)}", 40 if columns > 1 else 80), fontsize=9)
    for axis in axes.flat[len(matrices) :]:
        axis.set_visible(False)
    figure.colorbar(image, ax=list(axes.flat), label=f"{label} (framed: just trained)", shrink=0.9)
    return save(figure, path)


def plot_pruning(rows: Rows, path: str | Path, value: str = "bleu", label: str = "BLEU, mean over pairs") -> Path:
    """Draw a score against the share of neurons pruned, a line per criterion and scope; the whole model is dotted.

    Bands go from the lowest to the highest of several draws; a table has them of its score only.

    Args:
        rows: lines of `pruning_choices.pruning_table` of one model.
        path: of the SVG.
        value: column to draw.
        label: of the axis.
    """
    figure, axes = single(4.2)
    lines: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    drawn = {row["criterion"] for row in rows if "lowest" in row}  # some rates may have a single draw so far
    for row in rows:
        if row["criterion"] != "none":
            has_band = value in ("bleu", "chrf++") and row["criterion"] in drawn
            draws = [row.get(end, row[value]) for end in ("lowest", "highest")] if has_band else []
            lines.setdefault((row["criterion"], row["scope"]), []).append((100 * row["pruned"], row[value], *draws))
    criteria = [criterion for criterion, _ in lines]
    whole = [row[value] for row in rows if row["criterion"] == "none"]
    for i, ((criterion, scope), points) in enumerate(lines.items()):
        style = ("-", "--", ":")[i // len(COLORS) % 3]
        # as many markers as colors: without the shift, the second round would repeat the pairs of the first
        marker = MARKERS[(i + i // len(COLORS)) % len(MARKERS)]
        look = {"marker": marker, "color": COLORS[i % len(COLORS)], "ms": 4, "lw": 1.2}
        name = f"{criterion}, {scope}" if criteria.count(criterion) > 1 else criterion
        shares, values, *ends = zip(*sorted(points), strict=True)
        axes.plot(shares, values, style, label=name, **look)
        if ends:
            axes.fill_between(shares, *ends, color=look["color"], alpha=0.15, linewidth=0)
    if whole:
        axes.axhline(whole[0], color="0.4", linestyle=":", linewidth=1, label="whole model")
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    most = 1.12 * max((share for points in lines.values() for share, *_ in points), default=1.0)
    axes.set_xlim(0, most)
    ticks = [tick for tick in (0, 1, 2, 5, 10, 20, 40, 60, 100) if tick <= most]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("neurons pruned (%)")
    axes.set_ylabel(label)
    title = "bands: several draws" if axes.collections else None
    axes.legend(
        title=title, frameon=False, fontsize=7.5, title_fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    return save(figure, path)


def plot_attention(
    weights: np.ndarray, source: Sequence[str], target: Sequence[str], path: str | Path, title: str = ""
) -> Path:
    """Draw the cross-attention of one sentence: which source tokens each target token looks at.

    Args:
        weights: [target, source], rows sum to 1.
        source: tokens.
        target: tokens.
        path: of the SVG.
        title: of the figure.
    """
    figure, axes = panels(1, 1, 1.8 + 0.42 * len(source), 1.4 + 0.3 * len(target))
    axis = axes[0, 0]
    image = axis.imshow(weights, cmap="cividis", vmin=0, aspect="auto")
    axis.set_xticks(range(len(source)), [_visible(token) for token in source], rotation=60, ha="right", fontsize=9)
    axis.set_yticks(range(len(target)), [_visible(token) for token in target], fontsize=9)
    axis.set_xlabel("source")
    axis.set_ylabel("target")
    axis.tick_params(length=0)
    axis.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axis, label="attention")
    return save(figure, path)


def short_name(layer: str) -> str:
    """Return "encoder 0" for "model.encoder.layers.0.fc1"."""
    parts = layer.split(".")
    stack = next((part for part in parts if part in ("encoder", "decoder")), parts[0])
    return f"{stack} layer {next((part for part in parts if part.isdigit()), '')}".strip()


def _visible(token: str) -> str:
    return visible(token.replace("▁", "_"))


def _rectangle(*args: Any, **kwargs: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(*args, **kwargs)
