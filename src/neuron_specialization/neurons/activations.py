"""Count, per language pair, at how many token positions each FFN neuron is active (Neuron Specialization, section 3).

`a_n` is the number of positions where the value that enters the down projection is above zero. In gated blocks the
sign of the activated gate is counted, since the product with the other branch is almost never exactly zero.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm

from .ffn import DECODER, ENCODER, STACKS, FfnBlock, find_ffn_blocks, fingerprint, unwrap
from .language_pairs import check_pairs, check_source_tag


@dataclass
class ActivationCounts:
    """Activation counts of every FFN block, for several language pairs.

    Attributes:
        language_pairs: names of the pairs; row `i` of every tensor belongs to `language_pairs[i]`.
        counts: block name → int64 [pairs, d_ff], number of positions at which each neuron was active.
        tokens: stack → int64 [pairs], number of positions counted.
        stacks: block name → "encoder" or "decoder".
        fingerprint: what identifies the base model (see `neurons.ffn.fingerprint`).
        source_tag: what the tag on the source side names, "source" or "target".
    """

    language_pairs: list[str]
    counts: dict[str, torch.Tensor]
    tokens: dict[str, torch.Tensor]
    stacks: dict[str, str]
    fingerprint: dict[str, str | int] = field(default_factory=dict)
    source_tag: str = "source"

    def __add__(self, other: "ActivationCounts") -> "ActivationCounts":
        """Add the counts of pairs that both hold, and append the pairs that only `other` holds.

        Raises:
            ValueError: if the two were recorded on different models.
        """
        self._check_same_model(other)
        pairs = [*self.language_pairs, *(p for p in other.language_pairs if p not in self.language_pairs)]

        def total(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
            out = mine.new_zeros(len(pairs), *mine.shape[1:])
            out[: len(mine)] = mine
            return out.index_add_(0, torch.tensor([pairs.index(p) for p in other.language_pairs]), theirs)

        return ActivationCounts(
            pairs,
            {name: total(self.counts[name], other.counts[name]) for name in self.counts},
            {stack: total(self.tokens[stack], other.tokens[stack]) for stack in self.tokens},
            dict(self.stacks),
            dict(self.fingerprint),
            self.source_tag,
        )

    def merge(self, *others: "ActivationCounts") -> "ActivationCounts":
        """Add the counts of several recordings, for example of the shards of one corpus."""
        return sum(others, self)

    def all_reduce(self) -> "ActivationCounts":
        """Sum over the processes of `torch.distributed`, which must all hold the same pairs; without it, a no-op."""
        if not _is_distributed():
            return self
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"

        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            moved = tensor.to(device, copy=True)
            torch.distributed.all_reduce(moved)
            return moved.cpu()

        counts = {name: reduce(tensor) for name, tensor in self.counts.items()}
        tokens = {stack: reduce(tensor) for stack, tensor in self.tokens.items()}
        return ActivationCounts(
            self.language_pairs, counts, tokens, self.stacks, self.fingerprint, source_tag=self.source_tag
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the counts to one safetensors file."""
        tensors = {f"counts.{name}": tensor.contiguous() for name, tensor in self.counts.items()}
        tensors |= {f"tokens.{stack}": tensor.contiguous() for stack, tensor in self.tokens.items()}
        about = {
            "language_pairs": self.language_pairs,
            "stacks": self.stacks,
            "fingerprint": self.fingerprint,
            "source_tag": self.source_tag,
        }
        save_file(tensors, path, metadata={"activation_counts": json.dumps(about)})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "ActivationCounts":
        """Read counts written by `save`.

        Raises:
            ValueError: if the file holds something else.
        """
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get("activation_counts")
            if about is None:
                raise ValueError(
                    f"{path} holds no activation counts; expected a file written by ActivationCounts.save."
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        counts = {key.removeprefix("counts."): t for key, t in tensors.items() if key.startswith("counts.")}
        tokens = {key.removeprefix("tokens."): t for key, t in tensors.items() if key.startswith("tokens.")}
        return cls(counts=counts, tokens=tokens, **json.loads(about))

    def _check_same_model(self, other: "ActivationCounts") -> None:
        mine = {name: tensor.shape[1] for name, tensor in self.counts.items()}
        theirs = {name: tensor.shape[1] for name, tensor in other.counts.items()}
        if mine != theirs or self.fingerprint != other.fingerprint or self.source_tag != other.source_tag:
            raise ValueError(
                f"These counts come from different models: {self.fingerprint} with {len(mine)} blocks and "
                f"{other.fingerprint} with {len(theirs)} blocks. Record them on the same checkpoint."
            )


def record_activations(
    model: nn.Module,
    batches: Mapping[str, Iterable[Mapping[str, Any]]],
    count_padding: bool = False,
    source_tag: str = "source",
    progress: bool = True,
) -> ActivationCounts:
    """Run `model` over each pair's batches with teacher forcing and count active neurons.

    The model runs in eval mode without its LM head; counts stay on the device until the end.

    Args:
        model: an encoder-decoder model; also one with adapters, which then runs under their masks.
        batches: language pair → iterable of batches, each what the model's forward takes: `input_ids`,
            `attention_mask`, and `labels` or `decoder_input_ids`.
        count_padding: also count padding positions, as the code released with the paper does.
        source_tag: what the tag on the source side names, "source" or "target"; kept with the counts.
        progress: show a progress bar.

    Raises:
        ValueError: if a pair's name is malformed, if there is no pair, or if a pair has no batch.
    """
    pairs = check_pairs(batches)
    if not pairs:
        raise ValueError("Expected at least one language pair to record, got an empty mapping.")
    check_source_tag(source_tag)
    base = unwrap(model)
    blocks = find_ffn_blocks(base)
    recorder = _Recorder(blocks, len(pairs), count_padding, getattr(base.config, "pad_token_id", None))
    device = next(base.parameters()).device
    with recorder.attached(), _headless(base), _eval_mode(model), torch.no_grad():
        for index, pair in enumerate(pairs):
            seen = 0
            for batch in tqdm(batches[pair], desc=f"recording {pair}", disable=not progress, leave=False):
                moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                recorder.start_batch(index, moved)
                try:
                    model(**moved)
                except _BeforeHead:
                    pass
                seen += 1
            if not seen and not _is_distributed():  # other processes may hold this pair's batches
                raise ValueError(f"{pair} has no batch to record. Every pair needs at least one sentence pair.")
    return ActivationCounts(
        pairs,
        {name: tensor.cpu() for name, tensor in recorder.counts.items()},
        {stack: tensor.cpu() for stack, tensor in recorder.tokens.items()},
        {block.name: block.stack for block in blocks},
        fingerprint(base, blocks),
        source_tag,
    )


class _Recorder:
    """Hooks that add each block's active positions to counters on its device."""

    def __init__(self, blocks: list[FfnBlock], pairs: int, count_padding: bool, pad_token_id: int | None) -> None:
        self.blocks = blocks
        self.count_padding = count_padding
        self.pad_token_id = pad_token_id
        self.counts = {
            block.name: torch.zeros(pairs, block.d_ff, dtype=torch.int64, device=_device_of(block)) for block in blocks
        }
        self.tokens = {stack: torch.zeros(pairs, dtype=torch.int64) for stack in STACKS}
        self.pair = 0
        self.positions: dict[str, torch.Tensor] = {}

    def start_batch(self, pair: int, batch: Mapping[str, Any]) -> None:
        """Note which positions of the coming batch count: float32 [batch, length] of ones and zeros per stack."""
        self.pair = pair
        self.positions = {
            ENCODER: self._encoder_positions(batch).float(),
            DECODER: self._decoder_positions(batch).float(),
        }
        for stack, positions in self.positions.items():
            self.tokens[stack] = self.tokens[stack].to(positions.device)
            self.tokens[stack][pair] += positions.sum(dtype=torch.float64).long()

    def _encoder_positions(self, batch: Mapping[str, Any]) -> torch.Tensor:
        mask: torch.Tensor | None = batch.get("attention_mask")
        if mask is None:
            return torch.ones_like(batch["input_ids"])
        return torch.ones_like(mask) if self.count_padding else mask

    def _decoder_positions(self, batch: Mapping[str, Any]) -> torch.Tensor:
        labels: torch.Tensor | None = batch.get("labels")
        if labels is not None:
            return torch.ones_like(labels) if self.count_padding else labels != -100
        tokens: torch.Tensor | None = batch.get("decoder_input_ids")
        if tokens is None:
            raise ValueError("A batch to record needs labels or decoder_input_ids beside input_ids (teacher forcing).")
        if self.count_padding:
            return torch.ones_like(tokens)
        if batch.get("decoder_attention_mask") is not None:
            return batch["decoder_attention_mask"]
        real = tokens.ne(-1 if self.pad_token_id is None else self.pad_token_id)
        real[:, 0] = True  # the start token is a position even where it is the padding token (T5)
        return real

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the hooks for the length of the context."""
        handles = [self._attach(block) for block in self.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _attach(self, block: FfnBlock) -> RemovableHandle:
        if block.gate is None:
            return block.down.register_forward_pre_hook(lambda module, args: self._count(block, args[0]))
        return block.gate.register_forward_hook(
            lambda module, args, output: self._count(block, block.activation(output))
        )

    def _count(self, block: FfnBlock, values: torch.Tensor) -> None:
        """Add one count per active position. A product of 0/1 floats is exact up to 2^24 positions per batch."""
        positions = self.positions[block.stack]
        if values.shape[:2] != positions.shape:
            raise ValueError(
                f"{block.name} computes positions of shape {tuple(values.shape[:-1])}, but the batch has "
                f"{tuple(positions.shape)}; cannot tell which of them are padding."
            )
        active = torch.gt(values, 0, out=torch.empty(values.shape, dtype=torch.float32, device=values.device))
        counted = positions.reshape(-1).to(values.device) @ active.reshape(-1, block.d_ff)
        self.counts[block.name][self.pair] += counted.long()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _device_of(block: FfnBlock) -> torch.device:
    return next(block.down.parameters()).device


class _BeforeHead(Exception):
    """Raised by the hook that stops a forward pass before the LM head."""


@contextmanager
def _headless(model: Any) -> Iterator[None]:
    """Stop every forward pass at the output embedding, the costliest layer of a model with a large vocabulary."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return

    def stop(module: nn.Module, args: tuple) -> None:
        raise _BeforeHead

    handle = head.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
