"""Full modularity: every direction, or target language, has its own copy of each FFN, a ceiling of what masks over
one FFN can do."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from ..adapter.config import NeuronSpecializationConfig
from ..neurons.ffn import find_ffn_blocks, fingerprint
from ..neurons.language_pairs import Routes, split_pair
from ..neurons.masks import NeuronMasks


def ffn_copies(model: Any, language_pairs: Sequence[str], source_tag: str = "source", per_target: bool = False) -> Any:
    """Give each pair, or all pairs into one language, its own copy of every FFN block, and train it with all else.

    Each block is widened in place to one copy of its neurons per owner, and a mask row keeps the owner's copy and
    masks all others, so a pair starts from exactly what `model` computes. Only the output bias of a block is shared.
    In multi-task learning these are called language-specific FFNs. Copies for each pair can do all that copies for
    each target language can, but each of them learns from the batches of its own pair only.

    Args:
        model: a seq2seq model without adapters; it is changed.
        language_pairs: the pairs.
        source_tag: what the tag on the source side names.
        per_target: one copy for each target language, in both stacks.

    Returns:
        The model with a neuron specialization adapter, `trainable="full"`. An adapter directory saved from it loads
        onto a base that was widened in the same way.
    """
    pairs = list(language_pairs)
    owners = [split_pair(pair)[1] if per_target else pair for pair in pairs]
    copies = list(dict.fromkeys(owners))
    owned = torch.tensor([[owner == copied for copied in copies] for owner in owners])
    rows, stacks = {}, {}
    for block in find_ffn_blocks(model):
        for projection in (block.up, block.gate):
            if projection is not None:
                _repeat(projection, len(copies), dim=0)
        _repeat(block.down, len(copies), dim=1)
        rows[block.name] = owned.repeat_interleave(block.d_ff, dim=1)
        stacks[block.name] = block.stack
    routes = Routes.per_pair(pairs, source_tag)
    found = fingerprint(model, find_ffn_blocks(model))
    masks = NeuronMasks(rows, stacks, routes, {"name": "ffn_copies", "per_target": per_target}, found)
    config = NeuronSpecializationConfig(
        masks=masks, trainable="full", mask_bias=True, source_tag=source_tag, task_type="SEQ_2_SEQ_LM"
    )
    return get_peft_model(model, config)


def _repeat(projection: Any, times: int, dim: int) -> None:
    """Repeat the output features (`dim=0`) or the input features (`dim=1`) of a linear layer in place."""
    shape = (times, 1) if dim == 0 else (1, times)
    projection.weight = nn.Parameter(projection.weight.detach().repeat(shape))
    projection.out_features, projection.in_features = projection.weight.shape
    if dim == 0 and projection.bias is not None:
        projection.bias = nn.Parameter(projection.bias.detach().repeat(times))
