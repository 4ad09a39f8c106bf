"""What changes in units between two recordings of their mass, such as before and after a training step."""

from dataclasses import dataclass

import torch

from .mass_activation import MassActivation


@dataclass(frozen=True)
class MassChange:
    """Change of each unit of one layer, from one recording to another; all tensors [units].

    The code released with TX-Ray takes the Hellinger distance of values that do not sum to 1 (see `mass_activation`),
    and divides it by the number of distinct tokens that the unit has in either model. Its distances are therefore in
    no fixed range, and shrink as a unit gets more tokens; ours compare distributions, and are not divided.

    Attributes:
        hellinger: float64, Hellinger distance of the unit's token distributions, √(1 - Σ √(p q)), in [0, 1]; NaN
            unless the unit is alive in both. Distributions are shares of credit, which sum to 1.
        length: int64, number of distinct tokens after minus before.
        shared: bool, alive in both.
        only_before: bool.
        only_after: bool.
        positive: float64, positive mass per position after minus before.
        negative: float64, negative mass per position (a positive number) after minus before.
    """

    hellinger: torch.Tensor
    length: torch.Tensor
    shared: torch.Tensor
    only_before: torch.Tensor
    only_after: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor


def compare_mass(before: MassActivation, after: MassActivation, name: str, layer: str) -> MassChange:
    """Compare the units of one layer on one set of text.

    Raises:
        ValueError: if the recordings do not fit each other, or have no credit by token.
    """
    before.check_comparable(after)
    p, q = before.token_distribution(name, layer), after.token_distribution(name, layer)
    alive, still = before.alive(name, layer), after.alive(name, layer)
    distance = (1 - (p * q).sqrt().sum(1)).clamp_min(0).sqrt()
    return MassChange(
        hellinger=torch.where(alive & still, distance, torch.nan),
        length=after.length(name, layer) - before.length(name, layer),
        shared=alive & still,
        only_before=alive & ~still,
        only_after=still & ~alive,
        positive=_per_position(after, "positive", name, layer) - _per_position(before, "positive", name, layer),
        negative=_per_position(after, "negative", name, layer) - _per_position(before, "negative", name, layer),
    )


def _per_position(mass: MassActivation, sign: str, name: str, layer: str) -> torch.Tensor:
    row = mass.names.index(name)
    return getattr(mass, sign)[layer][row] / mass.positions[mass.stacks[layer]][row].clamp_min(1)
