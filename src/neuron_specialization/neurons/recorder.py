"""Hooks that count active neurons while a model runs."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .base_model import device_of
from .ffn import DECODER, ENCODER, STACKS, FfnBlock, is_time_major
from .positions import fit_positions, source_positions, target_positions


class CountingHook:
    """Forward (pre-)hook that counts a block's activations; a class, so that layers can tell it from other hooks."""

    def __init__(self, count: Callable[[torch.Tensor], None]) -> None:
        self.count = count

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor | None = None) -> None:
        self.count(args[0] if output is None else output)


def watch_neurons(block: FfnBlock, see: Callable[[torch.Tensor], None]) -> RemovableHandle:
    """Hand what decides whether neurons are active to `see`: what enters the down projection, or, in gated blocks,
    what the activation makes of the gate's output.

    The activation is applied once more there: its own output is hidden, and activation modules may be shared by all
    layers.
    """
    if block.gate is None:
        return block.down.register_forward_pre_hook(CountingHook(see))
    return block.gate.register_forward_hook(CountingHook(lambda output: see(block.activation(output))))


class Recorder:
    """Hooks that add each block's active positions to counters on its device.

    Attributes:
        counts: block name → [pairs, d_ff], of type `dtype`.
        tokens: stack → int64 [pairs].
    """

    dtype = torch.int64

    def __init__(self, model: Any, blocks: list[FfnBlock], pairs: int, count_padding: bool) -> None:
        self.model = model
        self.blocks = blocks
        self.count_padding = count_padding
        self.counts = {
            block.name: torch.zeros(pairs, block.d_ff, dtype=self.dtype, device=device_of(block.down))
            for block in blocks
        }
        self.tokens = {
            stack: torch.zeros(pairs, dtype=torch.int64, device=device_of(blocks[0].down)) for stack in STACKS
        }
        # of the batch that runs: its pair, where each stack counts, and what has been counted already
        self.pair = 0
        self.positions: dict[str, torch.Tensor | None] = {}
        self.counted_stacks: set[str] = set()
        self.counted_blocks: set[str] = set()
        self.padding_tokens: dict[str, torch.Tensor] = {}

    def start_batch(self, pair: int, batch: Mapping[str, Any]) -> None:
        """Find out which positions of the coming batch count: [batch, length] per stack, or None for all of them."""
        self.pair = pair
        self.counted_stacks, self.counted_blocks = set(), set()
        source, source_padding = source_positions(batch, self.model.config)
        target, target_padding = target_positions(batch, self.model.config)
        if self.count_padding:
            self.positions = {ENCODER: None, DECODER: torch.ones_like(target)}
            return
        self.positions = {ENCODER: source, DECODER: target}
        for name, padding in (("input_ids", source_padding), ("labels", target_padding)):
            if padding is not None:  # added up on the device: reading it in each batch would wait for the device
                self.padding_tokens[name] = self.padding_tokens.get(name, 0) + padding.sum()

    def check_batch(self) -> None:
        """Raise ValueError if a stack did not run, so that nothing was counted in it."""
        for stack in STACKS:
            names = {block.name for block in self.blocks if block.stack == stack}
            if names and not names & self.counted_blocks:
                raise ValueError(
                    f"Nothing was counted: no FFN block of the {stack} ran for this batch. Pass input_ids and labels "
                    "to the model itself, without encoder_outputs."
                )

    def warn_about_padding(self) -> None:
        """Warn where padding had to be recognized by its token."""
        remedy = {"labels": "Make padding -100 in labels", "input_ids": "Pass the tokenizer's attention_mask"}
        for name, count in self.padding_tokens.items():
            if count:
                warnings.warn(
                    f"The {name} end or begin with {int(count)} padding tokens (id {self.model.config.pad_token_id}), "
                    f"which were taken for padding and not counted. {remedy[name]}, so that the model ignores it too.",
                    stacklevel=3,
                )

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the hooks for the length of the context."""
        handles = [self._attach(block) for block in self.blocks]
        for experts, stack in _expert_groups(self.model, self.blocks):
            handles.append(experts.register_forward_pre_hook(partial(self._mark_padding, stack)))
            handles.append(experts.register_forward_hook(lambda module, args, output: output.nan_to_num()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, block: FfnBlock) -> RemovableHandle:
        return watch_neurons(block, partial(self._count, block))

    def _mark_padding(self, stack: str, module: nn.Module, args: tuple) -> tuple:
        """Make padding rows NaN before the experts read them: NaN is not above zero, so no expert counts them.

        Experts get tokens in an order of their own, so positions cannot be told apart there. The rows are cleared
        after the experts, and no real position attends to padding.
        """
        positions = self.positions[stack]
        if positions is None:
            return args
        padding = ~positions.bool().reshape(-1, 1)
        return (args[0].masked_fill(padding.to(args[0].device), torch.nan), *args[1:])

    def _count(self, block: FfnBlock, values: torch.Tensor) -> None:
        """Add the number of counted positions at which each neuron is active; `values` are what neurons emit.

        A block that runs again in the same pass sees something other than tokens (PEGASUS-X's global positions).
        """
        if block.name in self.counted_blocks:
            return
        self.counted_blocks.add(block.name)
        # straight into float32: a bool tensor would have to be converted for the product
        active = torch.gt(values, 0, out=torch.empty(values.shape, dtype=torch.float32, device=values.device))
        if values.ndim == 2:  # tokens routed to an expert; padding is marked
            self._add(block, active.sum(0, dtype=torch.float64))
            return
        positions = self._count_positions(block, values)
        # A product counts faster than any sum under a mask, and in float32 it is exact up to 2^24 positions per batch;
        # autocast would compute it in 16 bits.
        with torch.autocast(values.device.type, enabled=False):
            counts = positions.reshape(-1) @ active.reshape(-1, block.d_ff)
        self._add(block, counts)

    def _add(self, block: FfnBlock, counts: torch.Tensor) -> None:
        total = self.counts[block.name]
        total[self.pair] += counts.to(total)

    def _count_positions(self, block: FfnBlock, values: torch.Tensor) -> torch.Tensor:
        """Return where a block's values count, float32 in the shape of its positions; count those once per stack."""
        positions = self._positions_of(block.stack, values).to(values.device, torch.float32)
        if block.stack not in self.counted_stacks:
            self.counted_stacks.add(block.stack)
            total = self.tokens[block.stack]
            total[self.pair] += positions.sum(dtype=torch.float64).long().to(total.device)
        return positions

    def _positions_of(self, stack: str, values: torch.Tensor) -> torch.Tensor:
        """Return the positions in the shape of a block's values, [batch, length] or, time-major, [length, batch]."""
        positions = self.positions[stack]
        if positions is not None and self._is_time_major(len(positions), values):
            return fit_positions(positions, values.transpose(0, 1), stack).transpose(0, 1)
        return fit_positions(positions, values, stack)

    def _is_time_major(self, batch: int, values: torch.Tensor) -> bool:
        """Whether values are [length, batch, d_ff]; looked up in the model only where the shape does not tell."""
        if values.shape[0] != values.shape[1] or values.shape[0] != batch:
            return values.shape[0] != batch and values.shape[1] == batch
        return self.time_major

    @cached_property
    def time_major(self) -> bool:
        """Whether the model's layers compute on [length, batch, d_model]."""
        return is_time_major(self.model)


def _expert_groups(model: nn.Module, blocks: list[FfnBlock]) -> list[tuple[nn.Module, str]]:
    """Return the modules that hold several blocks in a ModuleDict or ModuleList and are called themselves: experts.

    Plain lists of layers are never called, so hooks on them do nothing.
    """
    modules = dict(model.named_modules())
    owners = {block.name.rpartition(".")[0].rpartition(".")[0]: block.stack for block in blocks}
    return [
        (modules[n], stack) for n, stack in owners.items() if isinstance(modules[n], nn.ModuleDict | nn.ModuleList)
    ]
