"""One object per call of a model: which mask rows its samples use.

A call is made when a model's `forward` or `generate` begins, and dropped when that returns or raises. Calls nest, and
each thread has its own; a masked layer uses the innermost one. Nothing about a call is kept on the model, so nothing
has to be reset after errors, in copies, or in pickles.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..neurons.ffn import STACKS
from .language_tokens import TokenBatch

# numbers calls and `with language_pair(...)` blocks in the order in which they begin
sequence = itertools.count()
LanguagePairs = list[str] | torch.Tensor


@dataclass(frozen=True)
class MaskRows:
    """The mask rows of a batch in one stack.

    Attributes:
        index: int64 [1] where one pair holds for the whole batch, else [samples]; -1 stands for the untouched base.
        has_base: whether -1 may occur.
        single: the one row of the whole batch, where there is one.
    """

    index: torch.Tensor
    has_base: bool
    single: int | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a model. Its fields do not change while it runs, whatever is selected meanwhile.

    Attributes:
        router: the router of the model that is called.
        pairs: the pairs passed to the call or selected when it began: names, or int64 pair ids; None where its tokens
            decide.
        tokens: its tokens.
        rows: adapter name → its rows in the encoder and in the decoder, or the error for layers that ask for them.
        adapter_names: PEFT's `adapter_names`, one per sample.
        generates: whether this is a `generate`, whose inner forward passes belong to it.
        alone: whether one layer is called by itself, outside of its model.
        handed_on: how each FFN block runs in the pass that is under way, by the block's id.
        compact_weights: what blocks gathered for the decoder steps of a `generate`.
        order: number in the sequence of calls and `with` blocks.
    """

    router: Any
    pairs: LanguagePairs | None
    tokens: TokenBatch
    rows: Mapping[str, tuple[MaskRows, MaskRows] | ValueError]
    adapter_names: list[str] | None = None
    generates: bool = False
    alone: bool = False
    handed_on: dict[int, Any] = field(default_factory=dict)
    compact_weights: dict[tuple, Any] = field(default_factory=dict)
    order: int = field(default_factory=sequence.__next__)

    def rows_in(self, adapter: str, stack: str, device: torch.device | None = None) -> MaskRows:
        """Return the rows that the batch uses in `stack` under `adapter`.

        Raises:
            ValueError: if no pair was passed, selected, or implied.
        """
        found = self.rows[adapter]
        if isinstance(found, ValueError):
            raise found
        rows = found[STACKS.index(stack)]
        return rows if device in (None, rows.index.device) else replace(rows, index=rows.index.to(device))


class _Calls(threading.local):
    """What this thread is running."""

    innermost: Call | None = None
    adapter_names: list[str] | None = None  # PEFT's, for the call that is about to begin


_calls = _Calls()

# Outputs that a later call may continue (encoder states, caches) → the call that made them. The references are weak:
# an entry is removed when the caller drops the output.
_origins: WeakIdKeyDictionary = WeakIdKeyDictionary()


def innermost_call(router: Any) -> Call | None:
    """Return the call that this thread is running, if it is one of this router's model."""
    call = _calls.innermost
    return call if call is not None and call.router is router else None


def run_in(call: Call | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a function as a part of `call`."""
    outer, _calls.innermost = _calls.innermost, call
    try:
        return function(*args, **kwargs)
    finally:
        _calls.innermost = outer


def steps_in(call: Call, steps: Iterator[Any]) -> Iterator[Any]:
    """Run each step of a generator as a part of `call`, which is not the innermost one between steps."""
    end = object()
    while (item := run_in(call, next, steps, end)) is not end:
        yield item


@contextmanager
def per_sample_adapters(names: list[str]) -> Iterator[None]:
    """Route each sample of the call that begins inside the context through the adapter named for it."""
    outer, _calls.adapter_names = _calls.adapter_names, names
    try:
        yield
    finally:
        _calls.adapter_names = outer


def take_adapter_names() -> list[str] | None:
    """Return the adapter names meant for the call that begins now; calls inside it have none."""
    names, _calls.adapter_names = _calls.adapter_names, None
    return names


def remember_origin(call: Call, outputs: Mapping[str, Any]) -> None:
    """Remember which call made the states and caches among its outputs."""
    for name in ("last_hidden_state", "encoder_last_hidden_state", "past_key_values"):
        if outputs.get(name) is not None:
            _origins[outputs[name]] = call


def origin_of(value: Any) -> Call | None:
    """Return the call that made an encoder's states or a cache, if it is known."""
    return None if value is None else _origins.get(value)


class CarriesCall:
    """Replaces a model's gradient checkpointing function: what it recomputes runs under the call that made it.

    The backward pass recomputes layers after their call has ended, possibly together with those of other calls, and on
    GPUs in one of autograd's threads.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # compiled code does not run Python again
            function = partial(run_in, _calls.innermost, function)
        return self.checkpoint(function, *args, **kwargs)
