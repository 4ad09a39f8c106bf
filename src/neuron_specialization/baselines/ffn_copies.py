"""Full modularity: every direction has its own copy of each FFN, the ceiling of what masks over one FFN can do."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from ..adapter.config import NeuronSpecializationConfig
from ..neurons.ffn import find_ffn_blocks, fingerprint
from ..neurons.language_pairs import Routes
from ..neurons.masks import NeuronMasks


def ffn_copies(model: Any, language_pairs: Sequence[str], source_tag: str = "source") -> Any:
    """Give each pair its own copy of every FFN block, and train all of it with everything else.

    Each block is widened in place to one copy of its neurons per pair, and a mask row keeps the pair's copy and
    masks all others, so a pair starts from exactly what `model` computes. Only the output bias of a block is shared.
    In multi-task learning these are called language-specific FFNs. A copy for each direction can do all that one for
    each target language could, and more.

    Args:
        model: a seq2seq model without adapters; it is changed.
        language_pairs: the pairs.
        source_tag: what the tag on the source side names.

    Returns:
        The model with a neuron specialization adapter, `trainable="full"`. An adapter directory saved from it loads
        onto a base that was widened in the same way.
    """
    pairs = list(language_pairs)
    rows, stacks = {}, {}
    for block in find_ffn_blocks(model):
        for projection in (block.up, block.gate):
            if projection is not None:
                _repeat(projection, len(pairs), dim=0)
        _repeat(block.down, len(pairs), dim=1)
        rows[block.name] = torch.eye(len(pairs), dtype=torch.bool).repeat_interleave(block.d_ff, dim=1)
        stacks[block.name] = block.stack
    routes = Routes.per_pair(pairs, source_tag)
    found = fingerprint(model, find_ffn_blocks(model))
    masks = NeuronMasks(rows, stacks, routes, {"name": "ffn_copies"}, found)
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
