"""Selectors: from activation counts to masks. Each is a small object with `select(counts) -> NeuronMasks`."""

import math
import warnings
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, Protocol

import torch

from .activations import ACTIVITY, ActivationCounts
from .ffn import DECODER, ENCODER, STACKS
from .language_pairs import Routes, split_pair
from .masks import NeuronMasks


class Selector(Protocol):
    """Anything that turns counts into masks."""

    def select(self, counts: ActivationCounts) -> NeuronMasks:
        """Return masks."""


@dataclass(frozen=True)
class CumulativeThreshold:
    """The paper's rule: the most active neurons that together make up a share `k` of all activations of a block.

    Per pair and block, sort the counts descending; keep the smallest prefix whose sum is at least `k` times the total,
    the neuron that crosses included (paper, section 3.2). Ties go to the neuron with the lower index. A block without
    a single activation stays dense, with a warning.

    Attributes:
        k: share in (0, 1]; 1 keeps every neuron that was ever active.
        encoder_k: another share for encoder blocks.
        decoder_k: another share for decoder blocks.
    """

    k: float = 0.95
    encoder_k: float | None = None
    decoder_k: float | None = None

    def __post_init__(self) -> None:
        for name, share in asdict(self).items():
            if share is not None or name == "k":
                check_share(name, share)

    def select(self, counts: ActivationCounts) -> NeuronMasks:
        """Return one row per pair and stack."""
        share = {
            ENCODER: self.k if self.encoder_k is None else self.encoder_k,
            DECODER: self.k if self.decoder_k is None else self.decoder_k,
        }
        rows = {name: smallest_prefix(c, share[counts.stacks[name]]) for name, c in counts.counts.items()}
        return per_pair_masks(rows, counts, self)


@dataclass(frozen=True)
class TopShare:
    """The most active `share` of each block's neurons, rounded up.

    Ties go to the neuron with the lower index. A block without a single activation stays dense, with a warning.
    """

    share: float

    def __post_init__(self) -> None:
        check_share("share", self.share)

    def select(self, counts: ActivationCounts) -> NeuronMasks:
        """Return one row per pair and stack."""
        rows = {}
        for name, count in counts.counts.items():
            order = count.argsort(dim=1, descending=True, stable=True)
            kept = order[:, : math.ceil(exact_share(self.share) * count.shape[1])]
            rows[name] = torch.zeros_like(count, dtype=torch.bool).scatter_(1, kept, True)
        return per_pair_masks(rows, counts, self)


@dataclass(frozen=True)
class RandomMatched:
    """As many neurons per row as `like` keeps, drawn at random: the control for any other selector.

    Attributes:
        like: the masks to match, row by row.
        seed: the draw depends on it and on nothing else.
    """

    like: NeuronMasks
    seed: int = 0

    def select(self, counts: ActivationCounts | None = None) -> NeuronMasks:
        """Return random masks; `counts` is not used, and accepted so that all selectors are called alike."""
        generator = torch.Generator().manual_seed(self.seed)
        rows = {}
        for name, like in self.like.rows.items():
            rank = torch.rand(like.shape, generator=generator, dtype=torch.float64).argsort(dim=1).argsort(dim=1)
            rows[name] = rank < like.sum(1, keepdim=True)
        selector = {"name": "RandomMatched", "seed": self.seed, "like": self.like.selector}
        return replace(self.like, rows=rows, selector=selector)


@dataclass(frozen=True)
class LAPE:
    """Language activation probability entropy (Tang et al., 2024), applied to each stack by itself.

    Counts are added up by source language in the encoder and by target language in the decoder. A neuron is language
    specific if its activation probability is high for some language and the entropy of its probabilities over
    languages is among the lowest. A language keeps every neuron that is not assigned exclusively to other languages,
    so a model keeps working under these masks.

    Attributes:
        entropy_share: share of a stack's neurons, lowest entropy first, that count as language specific.
        activity_quantile: quantile, over all layers, neurons and languages, that a probability must exceed.
    """

    entropy_share: float = 0.01
    activity_quantile: float = 0.95

    def __post_init__(self) -> None:
        check_share("entropy_share", self.entropy_share)
        check_share("activity_quantile", self.activity_quantile)

    def select(self, counts: ActivationCounts) -> NeuronMasks:
        """Return factorized masks: one encoder row per source language, one decoder row per target language."""
        if counts.source_tag == "target":
            raise ValueError(
                "LAPE adds up encoder counts by source language, but in this model the source side carries the "
                "target's tag (the Marian and MADLAD/T5 convention), so they depend on the target too."
            )
        rows: dict[str, torch.Tensor] = {}
        languages = {}
        for stack in STACKS:
            names = [name for name in counts.counts if counts.stacks[name] == stack]
            languages[stack], probabilities = language_probabilities(counts, stack, names)
            kept = self._kept(probabilities)
            rows.update(zip(names, kept.split([counts.counts[name].shape[1] for name in names], dim=1), strict=True))
        routes = Routes.per_language(languages[ENCODER], languages[DECODER], counts.language_pairs)
        rows = {name: rows[name].contiguous() for name in counts.counts}
        return NeuronMasks(rows=rows, routes=routes, selector=_describe(self, counts), **counts.origin)

    def _kept(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return bool [languages, neurons] from float64 activation probabilities of the same shape."""
        flat = probabilities.flatten()
        threshold = flat.kthvalue(max(1, round(exact_share(self.activity_quantile) * len(flat)))).values
        shares = probabilities / probabilities.sum(0, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        entropy = -torch.special.xlogy(shares, shares).sum(0)
        entropy[probabilities.amax(0) <= threshold] = torch.inf
        wanted = math.ceil(exact_share(self.entropy_share) * probabilities.shape[1])
        specific = torch.zeros(probabilities.shape[1], dtype=torch.bool)
        specific[entropy.argsort(stable=True)[:wanted]] = True
        specific &= entropy.isfinite()
        assigned = (probabilities > threshold) & specific
        return ~assigned.any(0) | assigned


def language_probabilities(counts: ActivationCounts, stack: str, names: list[str]) -> tuple[list[str], torch.Tensor]:
    """Return the languages of a stack's side, source or target, and each neuron's activations per position there.

    Args:
        counts: of language pairs; those that share the language of that side are added up.
        stack: "encoder" or "decoder".
        names: blocks of that stack.

    Returns:
        Languages, in the order of the pairs; float64 [languages, neurons of all these blocks].
    """
    side = STACKS.index(stack)
    codes = [split_pair(pair)[side] for pair in counts.language_pairs]
    languages = list(dict.fromkeys(codes))
    index = torch.tensor([languages.index(code) for code in codes])
    active = torch.cat([counts.counts[name] for name in names], dim=1)
    totals = active.new_zeros(len(languages), active.shape[1]).index_add_(0, index, active)
    tokens = torch.zeros(len(languages), dtype=torch.int64).index_add_(0, index, counts.tokens[stack])
    return languages, totals.double() / tokens.clamp_min(1).unsqueeze(1)


def smallest_prefix(counts: torch.Tensor, k: float) -> torch.Tensor:
    """Return bool [pairs, d_ff] from int64 or float64 counts of that shape; see CumulativeThreshold."""
    ordered, order = counts.sort(dim=1, descending=True, stable=True)
    running = ordered.cumsum(1)
    share, totals = exact_share(k), running[:, -1].tolist()
    if counts.is_floating_point():
        needed = torch.tensor([float(share * Fraction(total)) for total in totals], dtype=counts.dtype)
    else:  # whole numbers reach a share of their sum when they reach it rounded up
        needed = torch.tensor([math.ceil(share * total) for total in totals])
    # all that were active for a share of 1, also where rounding loses the smallest in the sum
    kept = ordered > 0 if share == 1 else running - ordered < needed.unsqueeze(1)
    return torch.zeros_like(kept).scatter_(1, order, kept)


def exact_share(share: float) -> Fraction:
    """Return the fraction that a float stands for: 7/100 for .07, 1/3 for 1 / 3, 3/10 for 1 - .7.

    Products of floats are slightly off, and would sometimes keep one neuron too many.
    """
    simple = Fraction(share).limit_denominator(10**6)
    return simple if simple and abs(simple - Fraction(share)) < 2**-52 else Fraction(str(share))


def per_pair_masks(rows: dict[str, torch.Tensor], counts: ActivationCounts, selector: Any) -> NeuronMasks:
    """Return masks of these rows, but dense where a pair has no activation to choose by."""
    inactive = {name: count.sum(1, keepdim=True) == 0 for name, count in counts.counts.items()}
    if any(bool(pairs.any()) for pairs in inactive.values()):
        names = ", ".join(name for name, pairs in inactive.items() if bool(pairs.any()))
        warnings.warn(
            f"No neuron was ever active in {names} for some pairs; these blocks stay dense there.", stacklevel=3
        )
    rows = {name: row | inactive[name] for name, row in rows.items()}
    routes = Routes.per_pair(counts.language_pairs, counts.source_tag)
    return NeuronMasks(rows=rows, routes=routes, selector=_describe(selector, counts), **counts.origin)


def _describe(selector: Any, counts: ActivationCounts) -> dict[str, Any]:
    measure = {} if counts.measure == ACTIVITY else {"measure": counts.measure}
    return {"name": type(selector).__name__, **asdict(selector), **measure}


def check_share(name: str, share: Any) -> None:
    """Raise ValueError unless `share` is a number in (0, 1]."""
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"{name} must be a share in (0, 1], got {share!r}.")
