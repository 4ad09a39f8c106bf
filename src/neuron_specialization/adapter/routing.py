"""Which rows each sample of the current batch uses: one object shared by a model and all its masked layers.

Order of precedence: pairs said for this call > the pair set on the model > language tokens in the batch > the
adapter's only pair > its default pair. The choice stays until the next forward pass, because gradient checkpointing
recomputes layers after the first one ends.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..neurons.base_model import unwrap
from ..neurons.ffn import STACKS
from .config import BASE_PAIR
from .language_tokens import TokenBatch
from .route_table import BASE_ROW, RouteTable

LanguagePairs = str | Sequence[str] | torch.Tensor
ATTRIBUTE = "_neuron_specialization_routing"


@dataclass
class Rows:
    """The mask rows of a batch in one stack.

    Attributes:
        index: int64 [1] where one pair holds for the whole batch, else [samples]; -1 stands for the untouched base.
        has_base: whether -1 may occur.
        single: the one row of the whole batch, where it is one.
    """

    index: torch.Tensor
    has_base: bool
    single: int | None = None


@dataclass
class Routing:
    """The current choice of pairs, per adapter.

    Attributes:
        tables: adapter name → its pairs.
        time_major: whether the model's layers compute on [length, batch, d_model].
        selected: pair set on the model until further notice.
        said: pairs said for the current call.
        batch: tokens of the current call.
        adapter_names: PEFT's `adapter_names` of the current call, one per sample.
        generating: whether a `generate` call has fixed the pairs for its inner forward passes.
        noted: whether it was said already that compact execution is not possible.
        gathered: narrow weights that the decoder steps of the current `generate` share.
    """

    tables: dict[str, RouteTable] = field(default_factory=dict)
    time_major: bool = False
    selected: str | None = None
    said: LanguagePairs | None = None
    batch: TokenBatch = field(default_factory=TokenBatch)
    adapter_names: list[str] | None = None
    generating: bool = False
    noted: bool = False
    gathered: dict[tuple, Any] = field(default_factory=dict)
    _current: dict[str, tuple[Rows, Rows] | ValueError] = field(default_factory=dict)
    _thread: int | None = None

    @torch.compiler.disable
    def begin(
        self, language_pairs: LanguagePairs | None, batch: TokenBatch | None = None, device: torch.device | None = None
    ) -> None:
        """Start a call: find every adapter's rows for it. What cannot be found is an error when a layer asks for it.

        Compiled code sees the result as tensors only, so another pair is no reason to compile again.

        Raises:
            ValueError: if a name is unknown to every adapter.
        """
        if isinstance(language_pairs, str):
            language_pairs = [language_pairs]
        if language_pairs is not None and not isinstance(language_pairs, torch.Tensor):
            language_pairs = list(language_pairs)
            for pair in dict.fromkeys(language_pairs):
                self.check(pair)
            if len(set(language_pairs)) == 1:
                language_pairs = language_pairs[:1]
        self.said, self.batch = language_pairs, batch or TokenBatch()
        self._current = {}
        for adapter in self.tables:
            self._find(adapter, device)

    def select(self, pair: str | None) -> None:
        """Set the pair that holds where none is said; None takes it back."""
        if pair is not None:
            self.check(pair)
        self.selected = pair
        self.said, self.batch, self._current = None, TokenBatch(), {}

    def check(self, pair: str) -> None:
        """Raise ValueError unless some adapter routes `pair`."""
        if not self.tables:
            raise ValueError(f"Got the language pair {pair!r}, but the model's adapters were deleted.")
        errors = []
        for table in self.tables.values():
            try:
                table.route(pair)
                return
            except ValueError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def rows(self, adapter: str, stack: str, device: torch.device | None = None) -> Rows:
        """Return the rows that the current batch uses in `stack` under `adapter`.

        Raises:
            ValueError: if no pair was said, set, or implied.
        """
        if adapter not in self._current:
            self._find(adapter, device)
        found = self._current[adapter]
        if isinstance(found, ValueError):
            raise found
        rows = found[STACKS.index(stack)]
        return rows if device in (None, rows.index.device) else replace(rows, index=rows.index.to(device))

    def single_route(self, adapter: str) -> tuple[int, int]:
        """Return the (encoder row, decoder row) of the pair set on the model, or of the adapter's only pair.

        Raises:
            ValueError: if the adapter has several pairs and none is set; merging needs one.
        """
        table = self.tables[adapter]
        return table.route(self.selected or table.fallback())

    def _find(self, adapter: str, device: torch.device | None) -> None:
        try:
            both, has_base = self._resolve(adapter, device)
        except ValueError as error:
            self._current[adapter] = error
        else:
            single = both[0].tolist() if len(both) == 1 else [None, None]
            encoder, decoder = (Rows(both[:, side].contiguous(), has_base, single[side]) for side in range(2))
            self._current[adapter] = encoder, decoder

    def _resolve(self, adapter: str, device: torch.device | None) -> tuple[torch.Tensor, bool]:
        """Return rows int64 [1 or samples, 2], and whether the base's may be among them."""
        table = self.tables[adapter]
        if isinstance(self.said, torch.Tensor):
            ids = self.said.to(device) if device is not None else self.said
            ids = ids[:1] if bool((ids == ids[:1]).all()) else ids  # one transfer per batch buys compact execution
            with_base = table.default_pair == BASE_PAIR
            lowest, count = -1 if with_base else 0, len(table.rows)
            if bool(((ids < lowest) | (ids >= count)).any()):
                raise ValueError(f"Expected pair ids from {lowest} to {count - 1}, got {sorted(set(ids.tolist()))}.")
            rows = table.rows.to(ids.device)[ids.clamp_min(0)]
            return (torch.where(ids[:, None] < 0, BASE_ROW, rows) if with_base else rows), with_base
        mine = None if self.adapter_names is None else [name == adapter for name in self.adapter_names]
        if self.said is not None:
            one_each = mine is not None and len(mine) == len(self.said)
            routes = [
                table.route(pair) if not one_each or mine is None or mine[i] else (0, 0)
                for i, pair in enumerate(self.said)
            ]
        elif self.selected is not None or table.reader is None or self.batch.is_empty:
            routes = [table.route(self.selected or table.fallback())]
        else:
            routes = table.read(self.batch, mine)
            routes = routes[:1] if len(set(routes)) == 1 else routes
        return torch.tensor(routes, device=device), any(row[0] == BASE_ROW for row in routes)

    @contextmanager
    def generation(
        self, language_pairs: LanguagePairs | None, batch: TokenBatch | None = None, device: torch.device | None = None
    ) -> Iterator[None]:
        """Fix the pairs of one `generate` call: its encoder and decoder passes all use them."""
        with self.one_thread():
            self.begin(language_pairs, batch, device)
            outer, self.generating = self.generating, True
            try:
                yield
            finally:
                self.generating = outer
                self.gathered.clear()

    @contextmanager
    def per_sample_adapters(self, names: list[str]) -> Iterator[None]:
        """Route each sample through the adapter named for it, for the length of the context."""
        self.adapter_names = names
        try:
            yield
        finally:
            self.adapter_names = None

    @contextmanager
    def one_thread(self) -> Iterator[None]:
        """Hold the routing for this thread; see `enter`."""
        entered = self.enter()
        try:
            yield
        finally:
            if entered:
                self.leave()

    @torch.compiler.disable
    def enter(self) -> bool:
        """Take the routing for this thread; return whether it was free before.

        Raises:
            RuntimeError: if another thread is inside a call of the same model: its pairs would be overwritten.
        """
        if self._thread not in (None, threading.get_ident()):
            raise RuntimeError(
                "Another thread is running this model. Its language pairs are kept on the model, so calls cannot "
                "overlap: give each thread a copy of the model, or use processes (DistributedDataParallel)."
            )
        free, self._thread = self._thread is None, threading.get_ident()
        return free

    @torch.compiler.disable
    def leave(self) -> None:
        """Give the routing back."""
        self._thread = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy starts outside of any call
        fresh: dict[str, Any] = {
            "said": None,
            "batch": TokenBatch(),
            "_current": {},
            "_thread": None,
            "generating": False,
            "gathered": {},
        }
        return {**vars(self), **fresh}


def routing_of(model: nn.Module) -> Routing:
    """Return the routing of a model with a neuron specialization adapter.

    Raises:
        ValueError: if it has none.
    """
    routing = getattr(unwrap(model), ATTRIBUTE, None)
    if routing is None:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no neuron specialization adapter; add one with "
            "get_peft_model(model, ns.NeuronSpecializationConfig(...)) or PeftModel.from_pretrained(...)."
        )
    return routing


def is_routed(model: nn.Module) -> bool:
    """Whether `model` takes `language_pairs`: it has an adapter of this method."""
    routing = getattr(unwrap(model), ATTRIBUTE, None)
    return routing is not None and bool(routing.tables)


def set_language_pair(model: nn.Module, pair: str | None) -> None:
    """Choose the pair that `model` runs wherever a call does not say one; None takes the choice back.

    Raises:
        ValueError: if the pair is unknown (lists those known) or the model has no adapter of this method.
    """
    routing_of(model).select(pair)


@contextmanager
def language_pair(model: nn.Module, pair: str) -> Iterator[None]:
    """Choose a pair for the length of a `with` block."""
    routing = routing_of(model)
    before = routing.selected
    routing.select(pair)
    try:
        yield
    finally:
        routing.select(before)
