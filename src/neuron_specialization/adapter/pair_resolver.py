"""One adapter's language pairs, resolved to mask rows: by name, by id, or from language tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..neurons.language_pairs import DEFAULT_PAIR, Routes
from .config import BASE_PAIR, NeuronSpecializationConfig
from .language_tokens import TagReader, TokenBatch, fitting_pairs

BASE_ROW = -1


@dataclass
class PairResolver:
    """Resolves one adapter's language pairs to mask rows.

    Attributes:
        routes: which rows each pair uses.
        default_pair: pair to fall back to; "base" stands for the untouched base.
        reader: reads pairs from language tokens, where the adapter knows its tokens.
    """

    routes: Routes
    default_pair: str | None = None
    reader: TagReader | None = None

    @cached_property
    def pairs(self) -> list[str]:
        """Names of the pairs; a pair's id is its position."""
        return self.routes.language_pairs

    @cached_property
    def rows(self) -> torch.Tensor:
        """Rows by pair id: int64 [pairs, 2], encoder and decoder."""
        return torch.tensor([self.routes.route(pair) for pair in self.pairs], dtype=torch.int64)

    def route(self, pair: str) -> tuple[int, int]:
        """Return the rows of a pair by name; unknown ones fall back to the default pair."""
        if pair == BASE_PAIR and self.default_pair == BASE_PAIR:
            return BASE_ROW, BASE_ROW
        if self.default_pair is not None and not self.routes.knows(pair):
            return self.route(self.default_pair)
        return self.routes.route(pair)

    def pair_id(self, pair: str) -> int:
        """Return the id of a pair, for `language_pairs` given as numbers; that of the base is -1.

        Raises:
            ValueError: if the pair has no id: composed pairs have names only.
        """
        if pair in self.pairs:
            return self.pairs.index(pair)
        if self.routes.knows(pair):
            raise ValueError(
                f"{pair!r} is composed of other pairs' rows and has no id: pass its name, or an adapter of masks that "
                "list it (masks.compose, or identify with --language_pairs)."
            )
        if self.default_pair == BASE_PAIR:
            return BASE_ROW
        if self.default_pair is not None or self.pairs == [DEFAULT_PAIR]:
            return self.pair_id(self.default_pair or DEFAULT_PAIR)
        raise ValueError(f"There is no language pair {pair!r} in the adapter. {self.routes.known()}")

    def fallback(self) -> str:
        """Return the pair to use when none was passed or selected and the tokens do not name one.

        Raises:
            ValueError: if there are several pairs and no default pair.
        """
        if len(self.pairs) == 1:
            return self.pairs[0]
        if self.default_pair is not None:
            return self.default_pair
        raise ValueError(
            "This adapter holds several language pairs and none was chosen. Pass language_pairs=[...] (one per "
            "sample) to the call, or choose one with ns.set_language_pair(model, ...) or "
            f"`with ns.language_pair(model, ...)`. {self.routes.known()}"
        )

    def rows_of_ids(self, ids: torch.Tensor, own_samples: Sequence[bool] | None = None) -> tuple[torch.Tensor, bool]:
        """Return the rows of pairs given as ids, and whether the base's row may be among them.

        Args:
            ids: int64 [1 or samples], on the device of the result.
            own_samples: which samples run under this adapter, or None for all; the others get the first rows.

        Returns:
            Rows, int64 [1 or samples, 2]: one where all samples have the same.

        Raises:
            ValueError: if an id is none of the adapter's.
        """
        if own_samples is not None and len(own_samples) == len(ids):
            ids = torch.where(torch.tensor(own_samples, device=ids.device), ids, 0)
        # one read by the host per batch, without which no batch could run compact
        ids = ids[:1] if bool((ids == ids[:1]).all()) else ids
        with_base = self.default_pair == BASE_PAIR
        lowest, count = BASE_ROW if with_base else 0, len(self.rows)
        if bool(((ids < lowest) | (ids >= count)).any()):
            raise ValueError(f"Expected pair ids from {lowest} to {count - 1}, got {sorted(set(ids.tolist()))}.")
        rows = self.rows.to(ids.device)[ids.clamp_min(0)]
        return (torch.where(ids[:, None] < 0, BASE_ROW, rows) if with_base else rows), with_base

    def routes_of(
        self,
        pairs: Sequence[str] | None,
        batch: TokenBatch,
        own_samples: Sequence[bool] | None = None,
        side: int | None = None,
    ) -> list[tuple[int, int]]:
        """Return the rows of pairs given as names, else of those that the tokens name, else of the fallback.

        Args:
            pairs: names, one or one per sample.
            batch: tokens of the call.
            own_samples: which samples run under this adapter, or None for all; the others get the first rows.
            side: 0 or 1 where only encoder rows or only decoder rows matter.

        Returns:
            (encoder row, decoder row), once or per sample.

        Raises:
            ValueError: if a pair has no route, or the pair cannot be determined.
        """
        if pairs is not None:
            one_each = own_samples is not None and len(own_samples) == len(pairs)
            return [
                self.route(pair) if own_samples is None or not one_each or own_samples[i] else (0, 0)
                for i, pair in enumerate(pairs)
            ]
        sources, targets = (None, None) if self.reader is None else self.reader.sides(batch)
        if sources is None and targets is None:
            return [self.route(self.fallback())]
        routes = self._read(batch, sources, targets, own_samples, side)
        return routes[:1] if len(set(routes)) == 1 else routes

    def _read(
        self,
        batch: TokenBatch,
        sources: list[str | None] | None,
        targets: list[str | None] | None,
        own_samples: Sequence[bool] | None,
        side: int | None,
    ) -> list[tuple[int, int]]:
        """Return the rows of each sample from its languages."""
        if batch.in_cache:
            raise ValueError(
                "A cached decoding step carries no language tokens, and the call that filled the cache is not known. "
                "Pass language_pairs=[...] to every step, or the cache that the model returned."
            )
        samples = len(sources or targets or [])
        routed: dict[tuple[str | None, str | None], tuple[int, int]] = {}
        routes = []
        for sample in range(samples):
            if own_samples is not None and not own_samples[sample * len(own_samples) // samples]:
                routes.append((0, 0))
                continue
            source = sources[sample] if sources is not None else None
            target = targets[sample] if targets is not None else None
            if (source, target) not in routed:
                untagged = (sources is not None and source is None) or (targets is not None and target is None)
                routed[source, target] = self._route_languages(sample, source, target, untagged, side)
            routes.append(routed[source, target])
        return routes

    def _route_languages(
        self, sample: int, source: str | None, target: str | None, untagged: bool, side: int | None
    ) -> tuple[int, int]:
        if untagged:
            if self.default_pair is not None:
                return self.route(self.default_pair)
            known = ", ".join(f"{code} {i}" for code, i in list(self.reader.ids.items())[:12]) if self.reader else ""
            raise ValueError(
                f"Sample {sample} of the batch does not carry exactly one of the adapter's language tokens ({known}) "
                "where one is expected. Tag it, pass language_pairs=[...], or give the adapter a default_pair."
            )
        if source is not None and target is not None:
            try:
                return self.route(f"{source}-{target}")
            except ValueError as error:
                raise ValueError(f"Sample {sample} of the batch: {error}") from error
        fits = fitting_pairs(self.pairs, source, target)
        routes = [self.routes.route(pair) for pair in fits]
        if len({route if side is None else route[side] for route in routes}) == 1:
            return routes[0]
        if not fits and self.default_pair is not None:
            return self.route(self.default_pair)
        known = f"from {source}" if source is not None else f"into {target}"
        raise ValueError(
            f"Sample {sample} of the batch is {known}, and its language tokens do not say more. "
            + (f"Of the pairs that fit, rows differ: {', '.join(fits[:20])}. " if fits else f"{self.routes.known()} ")
            + "Pass language_pairs=[...]."
        )


def resolver_of(config: NeuronSpecializationConfig) -> PairResolver:
    """Return what resolves the pairs of an adapter, by its config."""
    reader = TagReader(config.language_token_ids, config.source_tag) if config.language_token_ids else None
    return PairResolver(config.build_routes(), config.default_pair, reader)
