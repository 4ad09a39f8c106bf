"""Tables and figures of what happens to neurons from step to step, made from recordings of their mass."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..neurons.positions import IGNORED
from .mass_activation import MassActivation
from .mass_comparison import MassChange, compare_mass
from .mass_plots import plot_alive, plot_change, plot_mass, plot_top_tokens, short_name

_UNITS = 3  # of the last layer, those with most credit after the last step, whose top tokens are drawn


def change_table(masses: Mapping[str, MassActivation], name: str) -> list[dict[str, Any]]:
    """Return one row for each step after the first and layer: what changed in its units since the step before.

    Args:
        masses: step → recording with credit by token, in the order of the steps.
        name: set of text.

    Raises:
        ValueError: if two recordings do not fit each other.
    """
    rows = []
    steps = list(masses)
    for before, after in zip(steps[:-1], steps[1:], strict=True):
        for layer in masses[after].credit:
            change = compare_mass(masses[before], masses[after], name, layer)
            rows.append({"step": after, "layer": layer, **_summary(change)})
    return rows


def _summary(change: MassChange) -> dict[str, float]:
    """Return means over units; NaN where no unit is alive in both."""
    counts = {kind: int(getattr(change, kind).sum()) for kind in ("shared", "only_before", "only_after")}
    means = {"hellinger": change.hellinger.nanmean(), "length": change.length[change.shared].double().mean()}
    means |= {sign: getattr(change, sign).mean() for sign in ("positive", "negative")}
    return {**counts, **{key: value.item() for key, value in means.items()}}


def draw_steps(
    masses: Mapping[str, MassActivation], name: str, token: Callable[[int], str], directory: str | Path
) -> list[Path]:
    """Draw the units of the last step, which are alive after each step, and what the last step changed.

    Args:
        masses: step → recording with credit by token, at least two, in the order of the steps.
        name: set of text.
        token: id → text of a token.
        directory: where the figures go.
    """
    directory = Path(directory)
    *_, before, after = masses.values()
    *_, earlier, later = masses
    text = f"{name} validation text"

    def named(mass: MassActivation, unit: int) -> list[tuple[str, float]]:
        return [(token(i), share) for i, share in mass.top_tokens(name, last, unit, 8)]

    layers = list(after.credit)
    alive = {
        step: {
            layer: (int(lives.sum()), int((~lives).sum())) for layer in layers for lives in [mass.alive(name, layer)]
        }
        for step, mass in masses.items()
    }
    changes = {layer: compare_mass(before, after, name, layer) for layer in layers}
    last = layers[-1]
    most = after.credit[last][after.names.index(name)].topk(_UNITS).indices.tolist()
    tokens = {f"neuron {unit}": (named(before, unit), named(after, unit)) for unit in most}
    return [
        plot_mass(after, name, directory / "mass.svg"),
        plot_alive(alive, directory / "alive.svg", text),
        plot_change(changes, directory / "change.svg", f"{text}, from {earlier} to {later}"),
        plot_top_tokens(tokens, directory / "tokens.svg", f"{text}, {short_name(last)}, from {earlier} to {later}"),
    ]


def tag_table(
    masses: Mapping[str, MassActivation], name: str, batches: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return one row for each model: how the credit of its last layer with tags is shared among the tags.

    The first row, "share of tokens", is that of the text itself: what units get that take no notice of tags.

    Args:
        masses: model → recording with credit by tag, at least one.
        name: set of text.
        batches: that text, with "token_tags" (see `record_mass`).
    """
    tags = next(iter(masses.values())).tags
    of_tokens = torch.cat([batch["token_tags"][batch["token_tags"] != IGNORED] for batch in batches])
    shares = torch.bincount(of_tokens, minlength=len(tags)).double() / max(1, len(of_tokens))
    rows: list[dict[str, Any]] = [{"model": "share of tokens", **dict(zip(tags, shares.tolist(), strict=True))}]
    for model, mass in masses.items():
        credit: torch.Tensor = mass.tag_credit[list(mass.tag_credit)[-1]][mass.names.index(name)].sum(0)
        rows.append({"model": model, **dict(zip(mass.tags, (credit / credit.sum()).tolist(), strict=True))})
    return rows
