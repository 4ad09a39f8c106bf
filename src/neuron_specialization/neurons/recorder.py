"""Hooks that count active neurons while a model runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .ffn import DECODER, ENCODER, STACKS, FfnBlock, is_time_major


class CountingHook:
    """Forward (pre-)hook that hands a block's activations on; a class, so that layers know it from others' hooks."""

    def __init__(self, count: Callable[[torch.Tensor], None]) -> None:
        self.count = count

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor | None = None) -> None:
        self.count(args[0] if output is None else output)


class Recorder:
    """Hooks that add each block's active positions to counters on its device."""

    def __init__(self, model: Any, blocks: list[FfnBlock], pairs: int, count_padding: bool) -> None:
        self.model = model
        self.blocks = blocks
        self.count_padding = count_padding
        self.counts = {
            block.name: torch.zeros(pairs, block.d_ff, dtype=torch.int64, device=_device_of(block)) for block in blocks
        }
        self.tokens = {stack: torch.zeros(pairs, dtype=torch.int64, device=_device_of(blocks[0])) for stack in STACKS}
        self.pair = 0
        self.positions: dict[str, torch.Tensor | None] = {}
        self.uncounted: set[str] = set()
        self.counted: set[str] = set()

    def start_batch(self, pair: int, batch: Mapping[str, Any]) -> None:
        """Note which positions of the coming batch count: [batch, length] per stack, or None for all of them."""
        self.pair = pair
        self.positions = {ENCODER: self._encoder_positions(batch), DECODER: self._decoder_positions(batch)}
        self.uncounted, self.counted = set(STACKS), set()

    def _encoder_positions(self, batch: Mapping[str, Any]) -> torch.Tensor | None:
        return None if self.count_padding else batch.get("attention_mask")

    def _decoder_positions(self, batch: Mapping[str, Any]) -> torch.Tensor | None:
        labels: torch.Tensor | None = batch.get("labels")
        tokens: torch.Tensor | None = batch.get("decoder_input_ids")
        if labels is not None:
            return torch.ones_like(labels) if self.count_padding else labels != -100
        if tokens is None:
            raise ValueError("A batch to record needs labels or decoder_input_ids beside input_ids (teacher forcing).")
        if self.count_padding:
            return torch.ones_like(tokens)
        if batch.get("decoder_attention_mask") is not None:
            return batch["decoder_attention_mask"]
        pad_token_id = getattr(self.model.config, "pad_token_id", None)
        real = tokens.ne(-1 if pad_token_id is None else pad_token_id)
        real[:, 0] = True  # the start token is a position even where it is the padding token (T5)
        return real

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the hooks for the length of the context."""
        handles = [self._attach(block) for block in self.blocks]
        handles += [
            owner.register_forward_pre_hook(partial(self._mark_padding, stack))
            for owner, stack in _expert_groups(self.model, self.blocks)
        ]
        handles += [
            owner.register_forward_hook(lambda module, args, output: output.nan_to_num())
            for owner, _ in _expert_groups(self.model, self.blocks)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, block: FfnBlock) -> RemovableHandle:
        if block.gate is None:
            return block.down.register_forward_pre_hook(CountingHook(partial(self._count, block)))
        return block.gate.register_forward_hook(
            CountingHook(lambda output: self._count(block, block.activation(output)))
        )

    def _mark_padding(self, stack: str, module: nn.Module, args: tuple) -> tuple:
        """Make padding rows NaN before experts see them: NaN is not above zero, so they count for no expert.

        Experts get tokens in an order of their own, so positions cannot be told apart there. The rows are cleared
        behind the experts, and no real position attends to padding.
        """
        positions = self.positions[stack]
        if positions is None:
            return args
        padding = ~positions.bool().reshape(-1, 1)
        return (args[0].masked_fill(padding.to(args[0].device), torch.nan), *args[1:])

    def _count(self, block: FfnBlock, values: torch.Tensor) -> None:
        """Add one count per active position. A product of 0/1 floats is exact up to 2^24 positions per batch.

        Where a block runs again in the same pass, what it sees then is not the tokens (PEGASUS-X's global positions).
        """
        if block.name in self.counted:
            return
        self.counted.add(block.name)
        active = torch.gt(values, 0, out=torch.empty(values.shape, dtype=torch.float32, device=values.device))
        if values.ndim == 2:  # tokens routed to an expert; padding is marked
            self.counts[block.name][self.pair] += active.sum(0).long()
            return
        positions = self._fit(self.positions[block.stack], values, block.stack).float().to(values.device)
        if block.stack in self.uncounted:
            self.uncounted.discard(block.stack)
            total = self.tokens[block.stack]
            total[self.pair] += positions.sum(dtype=torch.float64).long().to(total.device)
        self.counts[block.name][self.pair] += (positions.reshape(-1) @ active.reshape(-1, block.d_ff)).long()

    def _fit(self, positions: torch.Tensor | None, values: torch.Tensor, stack: str) -> torch.Tensor:
        """Return positions of the shape that a block computes, [batch, length] or, time-major, [length, batch].

        Blocks may compute more positions than the batch has (windows are filled up; ProphetNet's future streams follow
        the main one), which do not count, or fewer (speech is shortened), which then stand for several each.
        """
        if positions is not None and self._is_time_major(len(positions), values):
            return self._fit_length(positions, values.transpose(0, 1), stack).transpose(0, 1)
        return self._fit_length(positions, values, stack)

    def _is_time_major(self, batch: int, values: torch.Tensor) -> bool:
        """Whether values are [length, batch, d_ff]; looked up in the model only where the shape does not tell."""
        if values.shape[0] != values.shape[1] or values.shape[0] != batch:
            return values.shape[0] != batch and values.shape[1] == batch
        return self.time_major

    @cached_property
    def time_major(self) -> bool:
        """Whether the model's layers compute on [length, batch, d_model]."""
        return is_time_major(self.model)

    @staticmethod
    def _fit_length(positions: torch.Tensor | None, values: torch.Tensor, stack: str) -> torch.Tensor:
        if positions is None:
            return torch.ones(values.shape[:2], device=values.device)
        given, computed = positions.shape[1], values.shape[1]
        if positions.shape[0] != values.shape[0]:
            raise ValueError(
                f"The {stack} computes a batch of {values.shape[0]}, but the batch given has {positions.shape[0]} "
                "rows; cannot tell which positions are padding."
            )
        if computed >= given:
            return nn.functional.pad(positions, (0, computed - given))
        return positions[:, torch.arange(computed, device=positions.device) * given // computed]


def _expert_groups(model: nn.Module, blocks: list[FfnBlock]) -> list[tuple[nn.Module, str]]:
    """Return the modules that hold several blocks in a ModuleDict or ModuleList and are called themselves: experts.

    Plain lists of layers are never called, so hooks on them do nothing.
    """
    modules = dict(model.named_modules())
    owners = {block.name.rpartition(".")[0].rpartition(".")[0]: block.stack for block in blocks}
    return [
        (modules[n], stack) for n, stack in owners.items() if isinstance(modules[n], nn.ModuleDict | nn.ModuleList)
    ]


def _device_of(block: FfnBlock) -> torch.device:
    return next(block.down.parameters()).device
