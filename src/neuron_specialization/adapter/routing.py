"""Which rows each sample of the current batch uses: one object shared by a model and all its masked layers.

Order of precedence: pairs said for this call > the pair set on the model > the adapter's only pair > its default pair.
The choice stays until the next forward pass, because gradient checkpointing recomputes layers after the
first one ends.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..neurons.ffn import STACKS, unwrap
from ..neurons.language_pairs import DEFAULT_PAIR, Routes
from .config import BASE_PAIR, NeuronSpecializationConfig

LanguagePairs = str | Sequence[str] | torch.Tensor
_ATTRIBUTE = "_neuron_specialization_routing"
BASE_ROW = -1


@dataclass
class Rows:
    """The mask rows of a batch in one stack.

    Attributes:
        index: int64 [1] where one pair holds for the whole batch, else [samples]; -1 stands for the untouched base.
        has_base: whether -1 may occur.
    """

    index: torch.Tensor
    has_base: bool


@dataclass
class RouteTable:
    """One adapter's pairs and their rows."""

    routes: Routes
    default_pair: str | None = None

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


@dataclass
class Routing:
    """The current choice of pairs, per adapter.

    Attributes:
        tables: adapter name → its pairs.
        selected: pair set on the model until further notice.
        said: pairs said for the current call.
        adapter_names: PEFT's `adapter_names` of the current call, one per sample.
        generating: whether a `generate` call has fixed the pairs for its inner forward passes.
    """

    tables: dict[str, RouteTable] = field(default_factory=dict)
    selected: str | None = None
    said: LanguagePairs | None = None
    adapter_names: list[str] | None = None
    generating: bool = False
    _cache: dict[tuple, Rows] = field(default_factory=dict)

    def begin(self, language_pairs: LanguagePairs | None) -> None:
        """Start a call: note the pairs said for it.

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
        self.said = language_pairs
        self._cache.clear()

    def select(self, pair: str | None) -> None:
        """Set the pair that holds where none is said; None takes it back."""
        if pair is not None:
            self.check(pair)
        self.selected = pair
        self.said = None
        self._cache.clear()

    def check(self, pair: str) -> None:
        """Raise ValueError unless some adapter routes `pair`."""
        errors = []
        for table in self.tables.values():
            try:
                table.route(pair)
                return
            except ValueError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def rows(self, adapter: str, stack: str, device: torch.device) -> Rows:
        """Return the rows that the current batch uses in `stack` under `adapter`.

        Raises:
            ValueError: if no pair was said, set, or implied.
        """
        key = (adapter, stack, device)
        if key not in self._cache:
            both = self._resolve(self.tables[adapter], device)
            for side, name in enumerate(STACKS):
                self._cache[adapter, name, device] = Rows(both.index[:, side].contiguous(), both.has_base)
        return self._cache[key]

    def single_route(self, adapter: str) -> tuple[int, int]:
        """Return the (encoder row, decoder row) of the pair set on the model, or of the adapter's only pair.

        Raises:
            ValueError: if the adapter has several pairs and none is set; merging needs one.
        """
        table = self.tables[adapter]
        return table.route(self.selected or table.fallback())

    def _resolve(self, table: RouteTable, device: torch.device) -> Rows:
        if isinstance(self.said, torch.Tensor):
            ids = self.said.to(device)
            rows = table.rows.to(device)[ids.clamp_min(0)]
            if table.default_pair == BASE_PAIR:
                return Rows(torch.where(ids[:, None] < 0, BASE_ROW, rows), True)
            return Rows(rows, False)
        names = self.said if self.said is not None else [self.selected or table.fallback()]
        routes = [table.route(pair) for pair in names]
        return Rows(torch.tensor(routes, device=device), any(row[0] == BASE_ROW for row in routes))

    @contextmanager
    def generation(self, language_pairs: LanguagePairs | None) -> Iterator[None]:
        """Fix the pairs of one `generate` call: its encoder and decoder passes all use them."""
        self.begin(language_pairs)
        outer, self.generating = self.generating, True
        try:
            yield
        finally:
            self.generating = outer

    @contextmanager
    def per_sample_adapters(self, names: list[str]) -> Iterator[None]:
        """Route each sample through the adapter named for it, for the length of the context."""
        self.adapter_names = names
        try:
            yield
        finally:
            self.adapter_names = None


class _BeforeForward:
    """Forward pre-hook of the base model: takes `language_pairs` out of the arguments. A class, so that it pickles."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        pairs = kwargs.pop("language_pairs", None)
        if not self.routing.generating:
            self.routing.begin(pairs)
        return args, kwargs


class _RoutedGenerate:
    """`generate` of the base model: fixes the pairs before the encoder runs, then calls the model's own."""

    def __init__(self, model: Any, routing: Routing) -> None:
        self.model = model
        self.routing = routing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.routing.generation(kwargs.pop("language_pairs", None)):
            return type(self.model).generate(self.model, *args, **kwargs)


def attach(model: nn.Module) -> Routing:
    """Return the routing of a base model, attaching one if there is none."""
    routing = getattr(model, _ATTRIBUTE, None)
    if routing is None:
        routing = Routing()
        setattr(model, _ATTRIBUTE, routing)
        model.register_forward_pre_hook(_BeforeForward(routing), with_kwargs=True)
        if callable(getattr(model, "generate", None)):
            model.generate = _RoutedGenerate(model, routing)  # type: ignore[assignment]
    return routing


def detach(model: nn.Module) -> None:
    """Take the routing of a base model away again."""
    if not hasattr(model, _ATTRIBUTE):
        return
    delattr(model, _ATTRIBUTE)
    vars(model).pop("generate", None)
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, _BeforeForward):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)


def routing_of(model: nn.Module) -> Routing:
    """Return the routing of a model with a neuron specialization adapter.

    Raises:
        ValueError: if it has none.
    """
    routing = getattr(unwrap(model), _ATTRIBUTE, None)
    if routing is None:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no neuron specialization adapter; add one with "
            "get_peft_model(model, ns.NeuronSpecializationConfig(...)) or PeftModel.from_pretrained(...)."
        )
    return routing


def is_routed(model: nn.Module) -> bool:
    """Whether `model` takes `language_pairs`."""
    return hasattr(unwrap(model), _ATTRIBUTE)


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


def table_of(config: NeuronSpecializationConfig) -> RouteTable:
    """Return the route table of an adapter's config."""
    return RouteTable(config.routes(), config.default_pair)
