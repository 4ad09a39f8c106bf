"""Selectors that weigh a neuron's activity for one pair against its activity for the others."""

import math
from dataclasses import dataclass

import torch

from .activations import ActivationCounts
from .masks import NeuronMasks
from .selection import check_share, exact_share, per_pair_masks, smallest_prefix


@dataclass(frozen=True)
class GeneralSpecific:
    """General neurons for every pair, and for each pair those that are specific to it (after Xie et al., 2021).

    Importance is the activation rate, the share of positions at which a neuron is active. A neuron is general if it
    is among the top `rho` of its block by importance summed over pairs (rounded up, ties to the lower index), and
    specific to a pair if its importance there exceeds `kappa` times its highest importance over pairs. A pair keeps
    both kinds.

    Attributes:
        rho: share in (0, 1] of general neurons.
        kappa: share in (0, 1]; at 1 no neuron is specific.
    """

    rho: float = 0.7
    kappa: float = 0.9

    def __post_init__(self) -> None:
        check_share("rho", self.rho)
        check_share("kappa", self.kappa)

    def select(self, counts: ActivationCounts) -> NeuronMasks:
        """Return one row per pair and stack."""
        rows = {}
        for name in counts.counts:
            rates = counts.rates(name)
            order = rates.sum(0).argsort(descending=True, stable=True)
            general = torch.zeros(rates.shape[1], dtype=torch.bool)
            general[order[: math.ceil(exact_share(self.rho) * rates.shape[1])]] = True
            rows[name] = general | (rates > self.kappa * rates.amax(0))
        return per_pair_masks(rows, counts, self)


@dataclass(frozen=True)
class Specificity:
    """The paper's cumulative rule on activity weighted by specificity: s = p · (p / mean of p over pairs)^gamma.

    p is the activation rate. `gamma=0` is `CumulativeThreshold(k)`; the larger gamma, the more neurons that are active
    mainly for this pair are preferred to those that are active for all pairs.

    Attributes:
        k: share in (0, 1] of the sum of s that the kept neurons make up.
        gamma: exponent, at least 0.
    """

    k: float = 0.95
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_share("k", self.k)
        if not isinstance(self.gamma, int | float) or not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma is a finite exponent of at least 0, got {self.gamma!r}.")

    def select(self, counts: ActivationCounts) -> NeuronMasks:
        """Return one row per pair and stack."""
        rows = {}
        for name, count in counts.counts.items():
            rates = counts.rates(name)
            relative = rates / rates.mean(0).clamp_min(torch.finfo(torch.float64).tiny)
            # counts instead of rates: the rule does not depend on a pair's scale, and with gamma=0 sums stay exact
            rows[name] = smallest_prefix(count.double() * relative**self.gamma, self.k)
        return per_pair_masks(rows, counts, self)
