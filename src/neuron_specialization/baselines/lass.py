"""LaSS (Lin et al., 2021): language-specific sub-networks of single weights.

Each direction fine-tunes the multilingual model by itself. Of every attention and FFN matrix the direction keeps the
weights whose magnitude after that is above the matrix's α-quantile. Then the multilingual model, not the fine-tuned
ones, trains on with all directions, one per batch, each under its mask. A weight that several directions keep is
shared, one that a single direction keeps is specific to it. Biases, norms and embeddings are not pruned, so all
directions share them.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from ..adapter.call import innermost_call
from ..adapter.config import NeuronSpecializationConfig
from ..neurons.adapter_file import pack_rows, unpack_rows
from ..neurons.ffn import STACKS, find_ffn_blocks, fingerprint
from ..neurons.files import replacing
from ..neurons.language_pairs import Routes
from ..neurons.masks import NeuronMasks
from ..neurons.selection import exact_share
from .dropout import set_dropout

DROPOUT = 0.3  # of the fine-tuning per direction, as published
MASK = "lass_mask"
_ADAPTER = "default"


class WeightMaskedLinear(nn.Linear):
    """A linear layer that runs with the weights that the language pair of the batch keeps.

    Attributes:
        lass_mask: buffer, uint8 [pairs, out_features, ceil(in_features / 8)], bit-packed like our mask rows.
        stack: "encoder" or "decoder"; a pair without masks of its own may have those of two pairs, as neurons do.
        routing: the layer that knows the pair, in a tuple, so that it is not this one's part.
    """

    lass_mask: torch.Tensor
    stack: str
    routing: tuple[Any]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project x [..., in_features] to [..., out_features].

        Raises:
            ValueError: if the batch has no pair or several.
        """
        (routing,) = self.routing
        if routing.disable_adapters:
            return super().forward(x)
        call = innermost_call(routing.router)
        row = None if call is None else call.rows_in(_ADAPTER, self.stack).single
        if row is None:
            raise ValueError(
                "LaSS masks whole weight matrices: every batch needs one language pair, the same for all."
            )
        return F.linear(x, self.weight * unpack_rows(self.lass_mask[row], self.in_features), self.bias)


def for_fine_tuning(model: Any) -> Any:
    """Return a copy of the multilingual model for the fine-tuning on one direction, with its dropout."""
    copied = copy.deepcopy(model)
    set_dropout(copied, DROPOUT)
    return copied


def magnitude_masks(model: Any, alpha: float) -> dict[str, torch.Tensor]:
    """Return which weights of a fine-tuned model its direction keeps: matrix → uint8 [out, ceil(in / 8)], bit-packed.

    Kept are weights with a magnitude strictly above that of the matrix's floor(alpha · n) smallest ones.

    Args:
        model: a seq2seq model without adapters, fine-tuned on the direction.
        alpha: share of each matrix to prune, in [0, 1).

    Raises:
        ValueError: if alpha is out of range, or a weight is not finite.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is the share of weights to prune, in [0, 1); got {alpha!r}.")
    masks = {}
    for name, _, linear in _matrices(model):
        magnitudes = linear.weight.detach().abs().float().cpu()
        if not magnitudes.isfinite().all():
            raise ValueError(f"{name} has weights that are not finite: the fine-tuning of the direction diverged.")
        pruned = math.floor(exact_share(alpha) * magnitudes.numel())
        threshold = magnitudes.flatten().kthvalue(pruned).values if pruned else -1
        masks[name] = pack_rows(magnitudes > threshold)
    return masks


def save_masks(per_pair: Sequence[Mapping[str, torch.Tensor]], path: Path) -> None:
    """Write the masks of several pairs into one safetensors file: matrix → uint8 [pairs, out, ceil(in / 8)]."""
    with replacing(path) as partial:
        save_file({name: torch.stack([masks[name] for masks in per_pair]) for name in per_pair[0]}, partial)


def lass(
    model: Any, masks: Mapping[str, torch.Tensor], language_pairs: Sequence[str], source_tag: str = "source"
) -> Any:
    """Put a multilingual model under the weight masks of several pairs, and train all of it.

    An adapter of ours, whose rows keep every neuron, routes the pairs; so batches, decoding and saving are those of
    every routed model. The weight masks are buffers of the base and stay out of the adapter's file: what is saved
    from the model loads into one that was put under the same masks.

    Args:
        model: a seq2seq model without adapters; it is changed.
        masks: matrix → uint8 [pairs, out, ceil(in / 8)], as `save_masks` writes them.
        language_pairs: the pairs, in the order of the masks.
        source_tag: what the tag on the source side names.
    """
    pairs, blocks = list(language_pairs), find_ffn_blocks(model)
    first = blocks[0]
    rows = {first.name: torch.ones(len(pairs), first.d_ff, dtype=torch.bool)}
    found = fingerprint(model, blocks)
    layers: list[Any] = []
    for name, stack, linear in _matrices(model):
        linear.__class__ = WeightMaskedLinear  # in place: references and saved keys stay what they are
        linear.stack = stack
        linear.register_buffer(MASK, masks[name].to(linear.weight.device))
        layers.append(linear)
    routed = NeuronMasks(rows, {first.name: first.stack}, Routes.per_pair(pairs, source_tag), {"name": "lass"}, found)
    config = NeuronSpecializationConfig(
        masks=routed, trainable="full", execution="masked", source_tag=source_tag, task_type="SEQ_2_SEQ_LM"
    )
    adapted = get_peft_model(model, config, adapter_name=_ADAPTER)
    for linear in layers:
        linear.routing = (model.get_submodule(first.name),)
    return adapted


def mask_bytes(model: Any) -> int:
    """Return the bytes of the weight masks of all pairs; 0 for a model of another method."""
    return sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith(f".{MASK}"))


def _matrices(model: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield name, stack and layer of every attention and FFN matrix: the linear layers of both stacks."""
    for stack in STACKS:
        for name, module in getattr(model, f"get_{stack}")().named_modules():
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
                yield f"{stack}.{name}", stack, module
