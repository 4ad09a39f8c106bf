"""Compact execution: compute only the neurons that a language pair keeps.

A masked neuron emits the constant `act(b1)`, so it can be cut out of a block without changing what the block computes:
the up projection computes the kept rows, the down projection reads the kept columns, and `W2[:, off] · act(b1[off])`
joins the bias. In gated blocks a masked neuron is silent. Outputs and gradients are those of the masked path.
"""

from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..neurons.adapter_file import unpack_rows
from ..neurons.ffn import FfnBlock


class Narrow:
    """The weights of one block for one row of masks, each gathered when it is first asked for.

    Args:
        block: the block.
        adapter: name of the adapter.
        kept: indices of the neurons kept, int64 [kept].
    """

    def __init__(self, block: "CompactBlock", adapter: str, kept: torch.Tensor) -> None:
        self.block, self.adapter, self.kept = block, adapter, kept

    @cached_property
    def up(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[kept, d_model] and bias [kept] of the masked projection."""
        base: Any = self.block.layer.base_layer
        weight = base.weight.index_select(0, self.kept)
        delta = self.block.layer.delta(self.adapter, self.kept)
        if delta is not None:
            weight = (weight + delta).to(weight.dtype)
        return weight, None if base.bias is None else base.bias.index_select(0, self.kept)

    @cached_property
    def other(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Likewise of a gated block's second projection; None in plain blocks."""
        other = self.block.other
        if other is None:
            return None
        return other.weight.index_select(0, self.kept), (
            None if other.bias is None else other.bias.index_select(0, self.kept)
        )

    @cached_property
    def down(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[d_model, kept], and the bias b2 + W2[:, off] · act(b1[off])."""
        block, down = self.block, self.block.down
        weight = down.weight.index_select(1, self.kept)
        up_bias = block.layer.base_layer.bias
        if up_bias is None or block.other is not None or block.layer.silences_masked():
            return weight, down.bias
        off = torch.ones_like(up_bias).index_fill(0, self.kept, 0)
        constant = down.weight @ (block.activation(up_bias) * off)
        return weight, constant if down.bias is None else down.bias + constant


class CompactBlock:
    """One FFN block that can run narrow. It belongs to the layer around the block's masked projection.

    It stands in for `forward` of the down projection (and of a gated block's second projection), which the model goes
    on calling: they see narrow inputs when the masked projection has made them so.
    """

    def __init__(self, layer: Any, block: FfnBlock, model: nn.Module) -> None:
        self.layer = layer
        self.activation = block.activation
        self.down: Any = block.down
        self.other: Any = block.up if block.gate is not None else None
        names = {id(module): name for name, module in model.named_modules()}
        self.places = [_place(model, names[id(part)]) for part in (block.down, block.gate and block.up) if part]
        self.parents = list({id(parent): parent for parent, _, _ in self.places}.values())
        self.indices: dict[tuple, torch.Tensor] = {}
        self.cached: tuple[tuple, Narrow, list[torch.Tensor]] | None = None
        self.elementwise = not any(_mixes_neurons(child, block.d_ff) for p in self.parents for child in p.children())
        self.stand_ins: list[tuple[Any, _NarrowInput | _NarrowOutput]] = [(self.down, _NarrowInput(self))]
        if self.other is not None:
            self.stand_ins.append((self.other, _NarrowOutput(self)))
        # what is no plain linear layer keeps its own forward, and the block runs masked for good
        self.stands_in = all(type(part) is nn.Linear and "forward" not in vars(part) for part, _ in self.stand_ins)
        if self.stands_in:
            for part, stand_in in self.stand_ins:
                part.forward = stand_in

    def release(self) -> None:
        """Give the projections their own `forward` back."""
        for part, _ in self.stand_ins if self.stands_in else ():
            vars(part).pop("forward", None)

    def narrow(self) -> Narrow | None:
        """Return the weights to run with, or None where the block has to run masked."""
        if torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled():
            self.cached = None  # an optimizer may write to weights in ways that leave no trace on them
        row = self.layer.single_row()
        if row is None:
            return None
        if self.obstacle() is not None:
            self.cached = None
            return None
        adapter, index = row
        tensors = self._tensors(adapter)
        key = (adapter, index, *map(_state, tensors))
        if self.cached is not None and self.cached[0] == key:
            return self.cached[1]
        kept = self._kept(adapter, index)
        if len(kept) == self.layer.out_features:
            return None
        found = Narrow(self, adapter, kept)
        if not torch.is_grad_enabled():
            # holding on to the old storage keeps its address from being given to other weights
            self.cached = key, found, [tensor.detach() for tensor in tensors if tensor is not None]
        return found

    def obstacle(self) -> str | None:
        """Return what keeps the block from running narrow, or None: it must be by itself, with plain weights."""
        base: Any = self.layer.base_layer
        parts = [part for part in (base, self.down, self.other) if part is not None]
        if not self.stands_in or any(
            type(part) is not nn.Linear or type(part.weight.data) is not torch.Tensor for part in parts
        ):
            return "weights that are not plain tensors"
        if not self.elementwise:
            return "an operation between the projections that is not elementwise"
        activation = [self.activation] if isinstance(self.activation, nn.Module) else []
        if any(_has_hooks(module) for module in [*parts, *activation, self.layer]):
            return "hooks on its projections or activation"
        if any(getattr(parent, name) is not part for parent, name, part in self.places):
            return "another adapter on its projections"
        if self.other is not None and base.bias is not None and not self.layer.silences_masked():
            return "a gate with a bias, whose masked neurons emit no constant"
        if self.layer.training and any(_drops_activations(parent) for parent in self.parents):
            return "activation dropout"
        return None

    def _tensors(self, adapter: str) -> list[torch.Tensor | None]:
        parts = [self.layer.base_layer, self.down, *([self.other] if self.other is not None else [])]
        own = [self.layer.neuron_specialization_mask[adapter], *self.layer.own_parameters(adapter)]
        return [*(part.weight for part in parts), *(part.bias for part in parts), *own]

    def gather(self, adapter: str, row: int) -> Narrow:
        """Return the weights of one row of one adapter."""
        return Narrow(self, adapter, self._kept(adapter, row))

    def _kept(self, adapter: str, row: int) -> torch.Tensor:
        """Return the indices of the neurons that a row keeps, int64 [kept], looked up once per row."""
        packed = self.layer.neuron_specialization_mask[adapter]
        key = (adapter, row, _state(packed))
        if key not in self.indices:
            stale = [old for old in self.indices if old[0] == adapter and old[2] != key[2]]
            for old in stale:
                del self.indices[old]
            self.indices[key] = unpack_rows(packed[row], self.layer.out_features).nonzero().flatten()
        return self.indices[key]


class _NarrowInput:
    """`forward` of a block's down projection."""

    def __init__(self, block: CompactBlock) -> None:
        self.block = block

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        down = self.block.down
        if x.shape[-1] == down.in_features:
            return F.linear(x, down.weight, down.bias)
        narrow = self.block.narrow()
        assert narrow is not None, "the block ran narrow a moment ago"
        return F.linear(x, *narrow.down)


class _NarrowOutput:
    """`forward` of a gated block's second projection."""

    def __init__(self, block: CompactBlock) -> None:
        self.block = block

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        narrow = self.block.narrow()
        if narrow is None or narrow.other is None:
            return F.linear(x, self.block.other.weight, self.block.other.bias)
        return F.linear(x, *narrow.other)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str, nn.Module]:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    return owner, child, getattr(owner, child)


def _state(tensor: torch.Tensor | None) -> tuple | None:
    """Return what changes when a tensor is written to, moved, cast or replaced."""
    if tensor is None:
        return None
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), version, tensor.data_ptr(), tensor.dtype, tensor.device


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        hasattr(module, "_hf_hook")  # accelerate moves weights in and out of the device
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _mixes_neurons(module: nn.Module, d_ff: int) -> bool:
    """Whether a module beside the projections works on all neurons of a position at once: a norm over them."""
    shape = getattr(module, "normalized_shape", None)
    weight = getattr(module, "weight", None)
    width = shape[-1] if shape else (weight.shape[-1] if isinstance(weight, torch.Tensor) and weight.ndim == 1 else 0)
    return width == d_ff


def _drops_activations(parent: nn.Module) -> bool:
    """Whether dropout may stand between the projections: it would drop the masked neurons' constants too."""
    rates = [child.p for child in parent.children() if isinstance(child, nn.Dropout)]
    return any(rate > 0 for rate in [*rates, getattr(parent, "activation_dropout", 0.0)])
