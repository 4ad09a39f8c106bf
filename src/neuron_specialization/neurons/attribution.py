"""Attribute the loss to FFN neurons by a first-order Taylor expansion: |a · ∂L/∂a| (Molchanov et al., 2017).

a is what a neuron emits at a position, L the cross-entropy summed over the target tokens of its sentence; so the
product estimates how much the loss would change if the neuron emitted 0 there. In gated blocks it is the same whether
a is the product that enters the down projection or the activated gate.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm

from .activations import ATTRIBUTION, ActivationCounts, check_recordable, each_batch, recorded
from .base_model import unwrap
from .ffn import DECODER, FfnBlock, find_ffn_blocks
from .observation import differentiable
from .positions import IGNORED
from .recorder import CountingHook, Recorder


class AttributionRecorder(Recorder):
    """Hooks that keep what each block emits, until the loss of the batch is differentiated by it."""

    dtype = torch.float64

    def __init__(self, model: Any, blocks: list[FfnBlock], pairs: int) -> None:
        super().__init__(model, blocks, pairs, count_padding=False)
        self.emitted: dict[str, torch.Tensor] = {}

    def differentiate(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch's |a · ∂L/∂a| to the sums.

        Args:
            logits: [batch, length, vocabulary].
            labels: int64 [batch, length].
        """
        counted: Any = self.positions[DECODER]
        labels = labels.masked_fill(~counted, IGNORED).to(logits.device)
        precise = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(precise, labels.flatten(), ignore_index=IGNORED, reduction="sum")
        gradients = torch.autograd.grad(loss, list(self.emitted.values()), allow_unused=True)
        blocks = {block.name: block for block in self.blocks}
        for (name, values), gradient in zip(self.emitted.items(), gradients, strict=True):
            if gradient is None:
                continue
            scores = (values.detach().to(torch.promote_types(values.dtype, torch.float32)) * gradient).abs()
            if values.ndim > 2:  # tokens routed to an expert have lost their positions; see _mark_padding
                scores = scores * self._count_positions(blocks[name], values).unsqueeze(-1)
            self.counts[name][self.pair] += scores.flatten(0, -2).sum(0, dtype=torch.float64)
        self.emitted.clear()

    def _attach(self, block: FfnBlock) -> RemovableHandle:
        return block.down.register_forward_pre_hook(CountingHook(partial(self._keep, block)))

    def _mark_padding(self, stack: str, module: nn.Module, args: tuple) -> tuple:
        """Leave padding as it is: no target depends on it, so its gradient is zero. NaN would spread through it."""
        return args

    def _keep(self, block: FfnBlock, values: torch.Tensor) -> None:
        if block.name in self.counted_blocks:  # see Recorder._count
            return
        self.counted_blocks.add(block.name)
        if not values.requires_grad:  # nothing below it is differentiated
            values.requires_grad_()
        self.emitted[block.name] = values


def record_attribution(
    model: nn.Module,
    batches: Mapping[str, Iterable[Mapping[str, Any]]],
    source_tag: str = "source",
    progress: bool | tqdm = True,
    language_token_ids: Mapping[str, int] | None = None,
) -> ActivationCounts:
    """Run `model` over each pair's batches with teacher forcing and sum |a · ∂L/∂a| of every neuron over positions.

    The sums take the place of counts: any selector works on them, the cumulative rule above all. Batches and processes
    add up. Padding has no effect on the loss, and so none on the sums; batch sizes affect only their rounding. The
    loss is that of all labels, the target's language tag among them where it is one.

    The model runs in eval mode, never compiled; its parameters get no gradient. A batch needs the memory of its logits
    and of a backward pass without those of weights.

    Args:
        model: an encoder-decoder model; also one with adapters, see `record_activations`.
        batches: language pair → iterable of batches, each what the model's forward takes: `input_ids`,
            `attention_mask` and `labels`.
        source_tag: see `record_activations`.
        progress: see `record_activations`.
        language_token_ids: see `record_activations`.

    Raises:
        ValueError: as `record_activations` does, and if a batch has no labels.
    """
    check_recordable(batches, source_tag)
    recorder = AttributionRecorder(unwrap(model), find_ffn_blocks(model), len(batches))
    with recorder.attached(), differentiable(model):
        for index, batch in each_batch(recorder.model, batches, progress):
            if batch.get("labels") is None:
                raise ValueError("Attribution is that of a loss: every batch needs labels.")
            recorder.start_batch(index, batch)
            logits = model(**batch)["logits"]
            recorder.check_batch()
            recorder.differentiate(logits, batch["labels"])
    return recorded(recorder, batches, ATTRIBUTION, source_tag, language_token_ids)
