"""Bottleneck adapters after every Transformer layer (Bapna & Firat, 2019), per language pair or language family."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from ..adapter.config import NeuronSpecializationConfig
from ..neurons.ffn import STACKS, find_ffn_blocks, fingerprint
from ..neurons.language_pairs import Routes, split_pair
from ..neurons.masks import NeuronMasks


class Bottleneck(nn.Module):
    """`x + up(relu(down(norm(x))))` with the neurons of all adapters; a mask keeps those of one.

    Args:
        d_model: width of the model.
        neurons: width of all adapters together.
    """

    def __init__(self, d_model: int, neurons: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.down = nn.Linear(d_model, neurons)
        self.activation = nn.ReLU()
        self.up = nn.Linear(neurons, d_model, bias=False)
        nn.init.zeros_(self.up.weight)  # the model starts with its own outputs

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return hidden states of the same shape, [batch, length, d_model]."""
        return hidden_states + self.up(self.activation(self.down(self.norm(hidden_states))))


def bottleneck_adapters(
    model: Any,
    language_pairs: Sequence[str],
    width: int,
    families: Mapping[str, str] | None = None,
    source_tag: str = "source",
) -> Any:
    """Add bottleneck adapters to a model and train them alone, the base frozen.

    Without families each pair has adapters of its own in both stacks (the paper's Adapter_LP). With them an encoder
    layer has one adapter per family of source languages and a decoder layer one per family of target languages
    (Adapter_Fam). Adapters of one layer share one block, whose neurons our masks route, so batches, decoding and
    saving are those of every routed model; they also share the normalization before them.

    Args:
        model: a seq2seq model without adapters, whose stacks keep their layers in `layers`; it is changed.
        language_pairs: the pairs.
        width: neurons of one adapter.
        families: language code → name of its family; None for adapters per pair.
        source_tag: what the tag on the source side names.

    Raises:
        ValueError: if a language has no family, or the model keeps its layers elsewhere.
    """
    routes = _routes(list(language_pairs), families, source_tag)
    d_model: Any = find_ffn_blocks(model)[0].down.out_features
    for stack, names in zip(STACKS, (routes.encoder_rows, routes.decoder_rows), strict=True):
        layers = getattr(getattr(model, f"get_{stack}")(), "layers", None)
        if layers is None:
            raise ValueError(f"The {stack} of {type(model).__name__} has no `layers` to add bottleneck adapters to.")
        for layer in layers:
            layer.bottleneck = Bottleneck(d_model, width * len(names)).to(next(layer.parameters()).device)
            layer.register_forward_hook(_through_bottleneck)
    blocks = find_ffn_blocks(model)
    added = [block for block in blocks if ".bottleneck." in block.name]
    rows = {
        block.name: torch.eye(block.d_ff // width, dtype=torch.bool).repeat_interleave(width, dim=1) for block in added
    }
    stacks = {block.name: block.stack for block in added}
    masks = NeuronMasks(rows, stacks, routes, {"name": "bottleneck_adapters"}, fingerprint(model, blocks))
    config = NeuronSpecializationConfig(
        masks=masks, trainable="full", mask_bias=True, source_tag=source_tag, task_type="SEQ_2_SEQ_LM"
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(".bottleneck." in name)
    return adapted


def _through_bottleneck(layer: Any, args: tuple, output: Any) -> Any:
    if isinstance(output, tuple):
        return (layer.bottleneck(output[0]), *output[1:])
    return layer.bottleneck(output)


def _routes(pairs: list[str], families: Mapping[str, str] | None, source_tag: str) -> Routes:
    if families is None:
        return Routes.per_pair(pairs, source_tag)
    codes = [split_pair(pair) for pair in pairs]
    missing = sorted({code for pair in codes for code in pair} - families.keys())
    if missing:
        raise ValueError(f"Expected the family of every language; missing: {', '.join(missing)}.")
    rows = [list(dict.fromkeys(f"family {families[pair[side]]}" for pair in codes)) for side in (0, 1)]
    listed = {
        name: (rows[0].index(f"family {families[source]}"), rows[1].index(f"family {families[target]}"))
        for name, (source, target) in zip(pairs, codes, strict=True)
    }
    return Routes(rows[0], rows[1], listed, source_tag)
