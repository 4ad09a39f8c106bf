"""Controls: masks that differ from those of a method in one property, to isolate its effect.

What they remove: the identity of the neurons (RandomOverlap), that a pair gets its own masks (WrongPair), that pairs
differ at all (Pooled), or that they differ beyond the direction (Pooled with a pivot). `RandomMatched` in `selection`
removes the overlap between pairs as well as the identity.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .activations import ActivationCounts
from .language_pairs import Routes, split_pair
from .masks import NeuronMasks


@dataclass(frozen=True)
class RandomOverlap:
    """`like` with the neurons of each block renumbered at random, in the same way for all pairs.

    Every row keeps its size and every two rows their intersection; only which neurons they are changes.

    Attributes:
        like: the masks to match.
        seed: the permutations depend on it and on nothing else.
    """

    like: NeuronMasks
    seed: int = 0

    def select(self, counts: ActivationCounts | None = None) -> NeuronMasks:
        """Return the permuted masks; `counts` is not used, and accepted so that all selectors are called alike."""
        generator = torch.Generator().manual_seed(self.seed)
        rows = {
            name: rows[:, torch.randperm(rows.shape[1], generator=generator)] for name, rows in self.like.rows.items()
        }
        return replace(self.like, rows=rows, selector=_describe(self, seed=self.seed))


def exchanged(pair: str, exchange: Mapping[str, str]) -> str:
    """Return the pair whose masks a pair gets."""
    return "-".join(exchange.get(code, code) for code in split_pair(pair))


def check_exchange(exchange: Mapping[str, str]) -> None:
    """Check which languages' masks `WrongPair` exchanges.

    Raises:
        ValueError: if it exchanges none, a language keeps its own masks, or some are used twice.
    """
    if not exchange or set(exchange) != set(exchange.values()) or any(a == b for a, b in exchange.items()):
        raise ValueError(
            "exchange must be a permutation of languages that moves each, such as {'de': 'zh', 'zh': 'de'}, so that "
            f"every mask is still used and none by its own language; got {dict(exchange)}."
        )


def check_exchanged_pairs(language_pairs: Sequence[str], exchange: Mapping[str, str]) -> None:
    """Check that every pair gets the masks of another pair.

    Raises:
        ValueError: if one keeps its own, so that it would be no control, or would get those of a pair not among them.
    """
    for pair in language_pairs:
        other = exchanged(pair, exchange)
        if other == pair or other not in language_pairs:
            whose = "its own masks" if other == pair else f"the masks of {other}, which is not among the pairs"
            raise ValueError(f"Under exchange={dict(exchange)}, {pair} would have {whose}.")


@dataclass(frozen=True)
class WrongPair:
    """`like` with the masks of languages exchanged: under {"de": "zh", "zh": "de"}, "en-de" gets those of "en-zh".

    Attributes:
        like: the masks whose rows are exchanged.
        exchange: language → another language, whose masks it gets; a permutation of its keys. Others keep their own.
    """

    like: NeuronMasks
    exchange: Mapping[str, str]

    def __post_init__(self) -> None:
        check_exchange(self.exchange)

    def select(self, counts: ActivationCounts | None = None) -> NeuronMasks:
        """Return masks with the same rows and exchanged routes; `counts` is not used.

        Raises:
            ValueError: if the masks have no route for a pair to exchange with.
        """
        old = self.like.routes
        listed = {}
        for pair in self.like.language_pairs:
            other = exchanged(pair, self.exchange)
            if other not in self.like.language_pairs:
                raise ValueError(f"{pair} would get the masks of {other}, which is not among the pairs. {old.known()}")
            listed[pair] = old.route(other)
        routes = Routes(old.encoder_rows, old.decoder_rows, listed, old.source_tag)
        return replace(self.like, routes=routes, selector=_describe(self, exchange=dict(self.exchange)))


@dataclass(frozen=True)
class Pooled:
    """One mask for all pairs, or one for those out of a pivot and one for those into it, as large as those of `like`.

    A block keeps the neurons with the highest activation rate (share of positions), averaged over the group's pairs:
    as many as `like` keeps there on average, rounded. Ties go to the neuron with the lower index.

    Attributes:
        like: the masks whose size is matched.
        pivot: a language; None pools all pairs.
    """

    like: NeuronMasks
    pivot: str | None = None

    def select(self, counts: ActivationCounts) -> NeuronMasks:
        """Return one row per pair and stack, the same for all pairs of a group.

        Raises:
            ValueError: if the counts have a pair that `like` has not, or that neither leaves nor enters the pivot.
        """
        pairs = counts.language_pairs
        groups = [self._group(pair) for pair in pairs]
        rows = {}
        for name, count in counts.counts.items():
            rates = counts.rates(name)
            rows[name] = torch.zeros_like(count, dtype=torch.bool)
            for group in set(groups):
                members = [i for i, other in enumerate(groups) if other == group]
                sizes = [int(self.like.row(pairs[i], name).sum()) for i in members]
                order = rates[members].sum(0).argsort(descending=True, stable=True)
                kept = order[: round(sum(sizes) / len(sizes))]
                rows[name][torch.tensor(members).unsqueeze(1), kept] = True
        routes = Routes.per_pair(pairs, counts.source_tag)
        selector = _describe(self, pivot=self.pivot)
        return NeuronMasks(rows=rows, routes=routes, selector=selector, **counts.origin)

    def _group(self, pair: str) -> str:
        if self.pivot is None:
            return "all"
        source, target = split_pair(pair)
        if self.pivot not in (source, target):
            raise ValueError(f"{pair} neither leaves nor enters the pivot {self.pivot!r}, so it is in no group.")
        return "out" if source == self.pivot else "into"


def _describe(selector: Any, **settings: Any) -> dict[str, Any]:
    return {"name": type(selector).__name__, **settings, "like": selector.like.selector}
