"""Which pair runs: the router of a model holds its adapters' pairs and the selected one, and begins its calls.

Order of precedence: pairs passed to the call > a `with language_pair(...)` block > the pair set on the model > the
call that this one continues > language tokens in the batch > the adapter's only pair > its default pair.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import torch
from torch import nn

from ..neurons.base_model import unwrap
from ..neurons.ffn import STACKS
from ..neurons.language_pairs import split_pair
from . import frozen_rows
from .call import Call, LanguagePairs, MaskRows, sequence, take_adapter_names
from .language_tokens import TokenBatch
from .pair_resolver import BASE_ROW, PairResolver

ATTRIBUTE = "_neuron_specialization_router"


@dataclass(eq=False)
class CallRouter:
    """What a model with adapters knows between calls.

    Attributes:
        resolvers: adapter name → its pairs.
        time_major: whether the model's layers compute on [length, batch, d_model].
        selected: the pair set on the model, or None.
        warned: whether a warning said that compact execution is not possible.
    """

    resolvers: dict[str, PairResolver] = field(default_factory=dict)
    time_major: bool = False
    selected: str | None = None
    warned: bool = False

    def select(self, pair: str | None) -> None:
        """Set the pair for calls that pass none; None clears it."""
        if pair is not None:
            self.check(pair)
        self.selected = pair

    def forget(self, adapter_name: str) -> None:
        """Remove an adapter's pairs, and the selection of one that no other adapter routes."""
        self.resolvers.pop(adapter_name, None)
        if self.selected is not None:
            try:
                self.check(self.selected)
            except ValueError:
                self.selected = None

    def check(self, pair: str) -> None:
        """Raise ValueError unless some adapter routes `pair`: one with a default pair routes all."""
        if not isinstance(pair, str):
            split_pair(pair)  # says what is expected
        if not self.resolvers:
            raise ValueError(f"Got the language pair {pair!r}, but the model's adapters were deleted.")
        errors = []
        for resolver in self.resolvers.values():
            try:
                resolver.route(pair)
                return
            except ValueError as error:
                errors.append(error)
        raise errors[0]

    def chosen_since(self, call: Call) -> bool:
        """Whether this thread opened a `with` block after `call` had begun, inside it: for another call."""
        thread = threading.get_ident()
        return any(b.router is self and b.thread == thread and b.order > call.order for b in tuple(_with_blocks))

    def chosen(self) -> str | None:
        """Return the pair of the innermost `with` block, else the one set on the model.

        A thread that opened no block counts as a worker of the one that did.

        Raises:
            RuntimeError: if several threads opened different ones.
        """
        latest = {block.thread: block.pair for block in tuple(_with_blocks) if block.router is self}
        if threading.get_ident() in latest:
            return latest[threading.get_ident()]
        if len(set(latest.values())) > 1:
            raise RuntimeError(
                f"Other threads run this model under different language pairs ({', '.join(latest.values())}), and "
                "this one chose none. Pass language_pairs=[...] to the call, or choose one in this thread."
            )
        return next(iter(latest.values()), self.selected)

    @torch.compiler.disable
    def begin(
        self,
        language_pairs: str | int | Sequence[str] | Sequence[int] | torch.Tensor | None = None,
        tokens: TokenBatch | None = None,
        *,
        samples: int | None = None,
        origin: Call | None = None,
        stack: str | None = None,
        device: torch.device | None = None,
        generates: bool = False,
    ) -> Call:
        """Make a call: find every adapter's rows. Rows that cannot be found raise an error when a layer asks for them.

        Compiled code sees the result as tensors only, so another pair needs no recompilation.

        Args:
            language_pairs: pairs passed to the call: names or ids, one, or one per sample.
            tokens: tokens of the call.
            samples: number of its samples, where it is known.
            origin: the call whose outputs it continues.
            stack: the stack that is called by itself; nothing need be known of the other one.
            device: where the model is.
            generates: whether it is a `generate`.

        Raises:
            ValueError: if a name is unknown to every adapter, or there are fewer or more pairs or adapter names than
                samples.
        """
        frozen_rows.put_back()
        names = take_adapter_names()
        if names is not None and samples is not None and len(names) != samples:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {samples} respectively."
            )
        pairs, tokens = self._passed(language_pairs, samples), tokens or TokenBatch()
        chosen = self.chosen() if pairs is None else None
        if chosen is not None:
            pairs = [chosen]
        elif pairs is None and origin is not None:
            pairs, tokens = origin.pairs, tokens.continuing(origin.tokens)
        if origin is not None and tokens.source is None:  # where the source's tag lies tells how the target begins
            tokens = replace(tokens, source=origin.tokens.source)
        side = None if stack is None else STACKS.index(stack)
        rows = {
            name: _found(resolver, pairs, tokens, None if names is None else [n == name for n in names], side, device)
            for name, resolver in self.resolvers.items()
        }
        return Call(self, pairs, tokens, rows, names, generates)

    def begin_alone(self, device: torch.device | None) -> Call:
        """Make a call for one layer that runs by itself, outside any call of the model.

        Raises:
            RuntimeError: if the layer is being recomputed: the call that it belongs to has ended.
        """
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "A masked layer is being recomputed by the backward pass, but the call it belongs to has ended. Use "
                "the model's own checkpointing, model.activation_checkpointing_enable() (Trainer: "
                "activation_checkpointing=True; both say gradient_checkpointing before transformers 5.23), which "
                "recomputes under the pairs of each call; torch's and FSDP's do not."
            )
        return replace(self.begin(device=device), alone=True)

    def single_route(self, adapter: str) -> tuple[int, int]:
        """Return the (encoder row, decoder row) of the pair set on the model, or of the adapter's only pair.

        Raises:
            ValueError: if the adapter has several pairs and none is set; merging needs one.
        """
        resolver = self.resolvers[adapter]
        return resolver.route(self.chosen() or resolver.fallback())

    def _passed(
        self, language_pairs: str | int | Sequence[str] | Sequence[int] | torch.Tensor | None, samples: int | None
    ) -> LanguagePairs | None:
        """Return the pairs passed to a call after checking them, one name where all are the same."""
        if language_pairs is None:
            return None
        pairs: Any = [language_pairs] if isinstance(language_pairs, str | Integral) else language_pairs
        if isinstance(pairs, torch.Tensor) or (len(pairs) > 0 and all(isinstance(pair, Integral) for pair in pairs)):
            pairs = torch.as_tensor(pairs).flatten()
            if pairs.is_floating_point() or pairs.dtype == torch.bool:
                raise ValueError(f"Expected language pairs as names or integer ids, got {pairs.dtype}.")
            pairs = pairs.long()  # torch takes uint8 for a mask where ids select rows
        if samples is not None and len(pairs) not in (1, samples):
            raise ValueError(
                f"Got language pairs for {len(pairs)} samples, but a batch of {samples}. Pass one per sample, or a "
                "single one for the whole batch."
            )
        if isinstance(pairs, torch.Tensor):
            return pairs
        for pair in [pair for pair in pairs if not isinstance(pair, str)] or dict.fromkeys(pairs):
            self.check(pair)
        return list(pairs)[:1] if len(set(pairs)) == 1 else list(pairs)


def _found(
    resolver: PairResolver,
    pairs: LanguagePairs | None,
    tokens: TokenBatch,
    own_samples: list[bool] | None,
    side: int | None,
    device: torch.device | None,
) -> tuple[MaskRows, MaskRows] | ValueError:
    """Return one adapter's rows for a call, or why there are none."""
    try:
        if isinstance(pairs, torch.Tensor):
            both, has_base = resolver.rows_of_ids(pairs if device is None else pairs.to(device), own_samples)
        else:
            routes = resolver.routes_of(pairs, tokens, own_samples, side)
            both, has_base = torch.tensor(routes, device=device), any(row[0] == BASE_ROW for row in routes)
    except ValueError as error:
        return error
    single = both[0].tolist() if len(both) == 1 else [None, None]
    encoder, decoder = (MaskRows(both[:, i].contiguous(), has_base, single[i]) for i in range(2))
    return encoder, decoder


@dataclass(frozen=True, eq=False)
class _WithBlock:
    """A `with language_pair(...)` block that is open in a thread."""

    router: CallRouter
    thread: int
    pair: str
    order: int = field(default_factory=sequence.__next__)


_with_blocks: list[_WithBlock] = []  # read as a tuple: other threads add and remove theirs meanwhile


def router_of(model: nn.Module) -> CallRouter:
    """Return the router of a model with a neuron specialization adapter.

    Raises:
        ValueError: if it has none.
    """
    router = getattr(unwrap(model), ATTRIBUTE, None)
    if router is None:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no neuron specialization adapter; add one with "
            "get_peft_model(model, ns.NeuronSpecializationConfig(...)) or PeftModel.from_pretrained(...)."
        )
    return router


def is_routed(model: nn.Module) -> bool:
    """Whether `model` takes `language_pairs`: it has an adapter of this method."""
    router = getattr(unwrap(model), ATTRIBUTE, None)
    return router is not None and bool(router.resolvers)


def pair_argument(model: nn.Module, pair: str) -> dict[str, list[str]]:
    """Return the argument that makes a call of `model` run one pair: none without an adapter of this method."""
    return {"language_pairs": [pair]} if is_routed(model) else {}


def set_language_pair(model: nn.Module, pair: str | None) -> None:
    """Select the pair that `model` runs in calls that pass none; None clears the selection.

    Calls under way keep theirs. Inside a `with language_pair(...)` block the block's pair holds.

    Raises:
        ValueError: if the pair is unknown (lists those known) and no adapter has a default pair to run in its place,
            or the model has no adapter of this method.
    """
    router_of(model).select(pair)


@contextmanager
def language_pair(model: nn.Module, pair: str) -> Iterator[None]:
    """Choose a pair for the length of a `with` block, in this thread and in workers that choose none themselves.

    Raises:
        ValueError: if the pair is unknown (lists those known) and no adapter has a default pair to run in its place,
            or the model has no adapter of this method.
    """
    router = router_of(model)
    router.check(pair)
    block = _WithBlock(router, threading.get_ident(), pair)
    try:
        _with_blocks.append(block)  # inside, for an interruption right behind it
        yield
    finally:
        if block in _with_blocks:
            _with_blocks.remove(block)
