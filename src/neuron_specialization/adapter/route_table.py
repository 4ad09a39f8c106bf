"""One adapter's language pairs and their mask rows: by name, by id, or read from language tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..neurons.language_pairs import DEFAULT_PAIR, Routes
from .config import BASE_PAIR, NeuronSpecializationConfig
from .language_tokens import TagReader, TokenBatch, fitting_pairs

BASE_ROW = -1


@dataclass
class RouteTable:
    """One adapter's pairs and their rows.

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
            ValueError: if the pair has no route of its own (composed pairs must be said by name).
        """
        if pair in self.pairs:
            return self.pairs.index(pair)
        if self.routes.knows(pair):
            raise ValueError(f"{pair!r} is composed of other pairs' rows and has no id of its own; say it by name.")
        if self.default_pair == BASE_PAIR:
            return BASE_ROW
        if self.default_pair is not None or self.pairs == [DEFAULT_PAIR]:
            return self.pairs.index(self.default_pair or DEFAULT_PAIR)
        raise ValueError(f"There is no language pair {pair!r} in the adapter. {self.routes.known()}")

    def fallback(self) -> str:
        """Return the pair to use when none was said.

        Raises:
            ValueError: if there are several pairs and no default.
        """
        if len(self.pairs) == 1:
            return self.pairs[0]
        if self.default_pair is not None:
            return self.default_pair
        raise ValueError(
            "This adapter holds several language pairs and none was chosen. Pass language_pairs=[...] (one per "
            "sample) to the call, or choose one with model.set_language_pair(...) or "
            f"`with ns.language_pair(model, ...)`. {self.routes.known()}"
        )

    def read(self, batch: TokenBatch, mine: Sequence[bool] | None) -> list[tuple[int, int]]:
        """Return the rows of each sample from its language tokens.

        Args:
            batch: tokens of the call.
            mine: which samples are this adapter's, or None for all; the others get row 0.

        Raises:
            ValueError: naming the first sample without exactly one language token, or whose pair has no route.
        """
        assert self.reader is not None
        sources, targets = self.reader.sides(batch)
        samples = len(sources or targets or [])
        routed: dict[tuple[str | None, str | None], tuple[int, int]] = {}
        rows = []
        for sample in range(samples):
            if mine is not None and not mine[sample * len(mine) // samples]:
                rows.append((0, 0))
                continue
            source = sources[sample] if sources is not None else None
            target = targets[sample] if targets is not None else None
            if (source, target) not in routed:
                untagged = (sources is not None and source is None) or (targets is not None and target is None)
                routed[source, target] = self._route_languages(sample, source, target, untagged)
            rows.append(routed[source, target])
        return rows

    def _route_languages(self, sample: int, source: str | None, target: str | None, untagged: bool) -> tuple[int, int]:
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
        routes = {self.routes.route(pair) for pair in fits}
        if len(routes) == 1:
            return routes.pop()
        if not fits and self.default_pair is not None:
            return self.route(self.default_pair)
        said = f"from {source}" if source is not None else f"into {target}"
        raise ValueError(
            f"Sample {sample} of the batch is {said}, and its language tokens tell no more. "
            + (f"Of the pairs that fit, rows differ: {', '.join(fits[:20])}. " if fits else f"{self.routes.known()} ")
            + "Pass language_pairs=[...]."
        )


def table_of(config: NeuronSpecializationConfig) -> RouteTable:
    """Return the route table of an adapter's config."""
    reader = TagReader(config.language_token_ids, config.source_tag) if config.language_token_ids else None
    return RouteTable(config.build_routes(), config.default_pair, reader)
