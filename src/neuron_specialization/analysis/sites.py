"""Places in a model where hidden states are recorded, found by structure."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ..neurons.base_model import device_of
from ..neurons.ffn import STACKS, FfnBlock, find_ffn_blocks
from ..neurons.recorder import watch_neurons

SITES = ("pre_activation", "neurons", "residual")


@dataclass(frozen=True, eq=False)
class Place:
    """One layer at one site.

    Attributes:
        name: of the FFN block, or of the Transformer layer's module.
        stack: "encoder" or "decoder".
        layer: index inside its stack.
        units: width of the hidden states there.
        module: where the hook goes.
        reads_input: whether the hidden states are what the module reads, rather than what it returns.
        device: of the hidden states.
        gated: the block, where its activated gate rather than the sign of the hidden states says whether a neuron is
            active: at site "neurons" of gated FFNs, whose product with the other branch has signs of its own.
    """

    name: str
    stack: str
    layer: int
    units: int
    module: nn.Module
    reads_input: bool
    device: torch.device
    gated: FfnBlock | None = None


def find_places(
    model: nn.Module, site: str, layers: Sequence[int] | None = None, stack: str | None = None
) -> list[Place]:
    """Return the places of a site, encoder first.

    Args:
        model: a plain transformers encoder-decoder model.
        site: one of SITES.
        layers: layers of each stack, from 0; None for all.
        stack: "encoder" or "decoder"; None for both.

    Raises:
        ValueError: if the site, the stack or a layer does not exist.
    """
    if site not in SITES:
        raise ValueError(f"site must be one of {', '.join(SITES)}, got {site!r}.")
    if stack not in (None, *STACKS):
        raise ValueError(f"stack must be 'encoder' or 'decoder', got {stack!r}.")
    blocks = [block for block in find_ffn_blocks(model) if stack in (None, block.stack)]
    if layers is not None:
        known = {block.layer for block in blocks}
        absent = sorted(set(layers) - known)
        if absent:
            raise ValueError(f"There is no layer {absent}; the layers are {sorted(known)}.")
        blocks = [block for block in blocks if block.layer in set(layers)]
    modules = dict(model.named_modules())
    return list({place.name: place for block in blocks for place in [_place(site, block, modules)]}.values())


def _place(site: str, block: FfnBlock, modules: dict[str, nn.Module]) -> Place:
    down: Any = block.down
    device = device_of(down)
    if site == "neurons":
        gated = block if block.gate is not None else None
        return Place(block.name, block.stack, block.layer, block.d_ff, down, True, device, gated)
    if site == "pre_activation":
        return Place(block.name, block.stack, block.layer, block.d_ff, modules[block.name], False, device)
    # the element of the list of layers that the block is in
    found = re.search(rf"^.*?\.{block.layer}(?=\.)", block.name)
    if found is None:
        raise ValueError(f"{block.name} is in no list of Transformer layers, so it has no residual stream to record.")
    return Place(found.group(), block.stack, block.layer, down.out_features, modules[found.group()], False, device)


@contextmanager
def attached(
    places: Sequence[Place],
    record: Callable[[Place, torch.Tensor], None],
    see_gate: Callable[[Place, torch.Tensor], None],
) -> Iterator[None]:
    """Pass the hidden states of every place to `record`, and the activated gate of gated ones to `see_gate`, for the
    length of the context."""
    handles = []
    for place in places:
        if place.reads_input:
            hook = place.module.register_forward_pre_hook(lambda module, args, place=place: record(place, args[0]))
        else:
            hook = place.module.register_forward_hook(
                lambda module, args, output, place=place: record(
                    place, output if torch.is_tensor(output) else output[0]
                )
            )
        handles.append(hook)
        if place.gated is not None:
            handles.append(watch_neurons(place.gated, partial(see_gate, place)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
