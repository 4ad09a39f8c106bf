"""Compact execution: compute only the neurons that a language pair keeps.

A masked neuron emits the constant `act(b1)`, so it can be cut out of a block without changing what the block computes:
the up projection computes the kept rows, the down projection reads the kept columns, and `W2[:, off] · act(b1[off])`
joins the bias. In gated blocks a masked neuron is silent. Outputs and gradients are those of the masked path.

A few masked neurons are computed along, with zero rows of W1, to fill the width up to a multiple that matrix products
are fast for; up to the whole block, nothing has to be gathered at all.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..neurons.adapter_file import unpack_rows
from ..neurons.ffn import DECODER, FfnBlock
from ..neurons.recorder import CountingHook

# What pays, measured on a CPU at d_model 1,024. Not measured on a GPU yet; if one says otherwise, figures per kind of
# device belong here. `make benchmark-gpu` measures.
WIDTH_MULTIPLE = 16  # in float32, one 64-byte line; matrix products of other widths were 6 % slower
FEW_TOKENS = 256  # below, gathering weights for one use costs more than it saves

LOOKED_UP = 64  # rows of masks whose neurons a block remembers: 0.5 MB per block at 1,000 neurons each

RECORDING = "activations being recorded"


class Narrow:
    """The weights of one block for one row of masks, each gathered when it is first asked for.

    Args:
        block: the block.
        adapter: name of the adapter.
        computed: indices of the neurons that are computed, int64 [computed]; None for all of the block's.
        filler: indices among them of masked neurons, which only fill the width up, int64.
    """

    def __init__(
        self, block: "CompactBlock", adapter: str, computed: torch.Tensor | None, filler: torch.Tensor
    ) -> None:
        self.block, self.adapter, self.computed, self.filler = block, adapter, computed, filler

    def _take(self, values: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return values if self.computed is None else values.index_select(dim, self.computed)

    @cached_property
    def up(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[computed, d_model] and bias [computed] of the masked projection."""
        base: Any = self.block.layer.base_layer
        weight, bias = self._take(base.weight), None if base.bias is None else self._take(base.bias)
        delta = self.block.layer.delta(self.adapter, self.computed)
        if delta is not None:
            weight = (weight + delta).to(weight.dtype)
        if len(self.filler):
            weight = weight.index_fill(0, self.filler, 0)
            if bias is not None and self.block.layer.silences_masked():
                bias = bias.index_fill(0, self.filler, 0)
        return weight, bias

    @cached_property
    def other(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Likewise of a gated block's second projection; None in plain blocks."""
        other = self.block.other
        if other is None:
            return None
        return self._take(other.weight), None if other.bias is None else self._take(other.bias)

    @cached_property
    def down(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[d_model, computed], and the bias b2 + W2[:, off] · act(b1[off]) with off the neurons not computed."""
        block, down = self.block, self.block.down
        weight = self._take(down.weight, 1)
        up_bias = block.layer.base_layer.bias
        if self.computed is None or up_bias is None or block.other is not None or block.layer.silences_masked():
            return weight, down.bias
        constant = down.weight @ block.activation(up_bias).index_fill(0, self.computed, 0)
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
        self.looked_up: dict[tuple[str, int], _LookedUp] = {}
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

    def narrow(self, x: torch.Tensor) -> Narrow | None:
        """Return the weights to run with on inputs like `x`, or None where the block has to run masked.

        The decoder steps of one `generate` share what was gathered. Between calls nothing is kept: weights may be
        written to in ways that leave no trace.
        """
        if torch.compiler.is_compiling():
            return None
        row = self.layer.single_row()
        if row is None or self.obstacle() is not None or not self._pays(row[0], x):
            return None
        if torch.is_grad_enabled() or not self._many_steps:
            return Narrow(self, row[0], *self._computed(*row))
        gathered, key = self.layer.call().compact_weights, (id(self), *row)
        if key not in gathered:
            gathered[key] = Narrow(self, row[0], *self._computed(*row))
        return gathered[key]

    @property
    def _many_steps(self) -> bool:
        return self.layer.call().generates and self.layer.stack == DECODER

    def _pays(self, adapter: str, x: torch.Tensor) -> bool:
        """Whether gathering saves time, where it is not demanded: it does for many tokens, or many decoder steps."""
        return self._many_steps or self.layer.execution[adapter] == "compact" or x.numel() // x.shape[-1] >= FEW_TOKENS

    def obstacle(self) -> str | None:
        """Return what keeps the block from running narrow, or None: it must be by itself, with plain weights."""
        base: Any = self.layer.base_layer
        parts = [part for part in (base, self.down, self.other) if part is not None]
        if not self.stands_in or any(
            type(part) is not nn.Linear or type(part.weight.data) is not torch.Tensor for part in parts
        ):
            return "weights that are not plain tensors"
        if "forward" in vars(base):
            return "a projection with a forward of its own"
        if not self.elementwise:
            return "an operation between the projections that is not elementwise"
        activation = [self.activation] if isinstance(self.activation, nn.Module) else []
        if any(_records(module) for module in [*parts, self.layer]):
            return RECORDING
        if any(_has_hooks(module) for module in [*parts, *activation, self.layer]):
            return "hooks on its projections or activation"
        if any(getattr(parent, name) is not part for parent, name, part in self.places):
            return "another adapter on its projections"
        if self.other is not None and base.bias is not None and not self.layer.silences_masked():
            return "a gate with a bias, whose masked neurons emit no constant"
        if self.layer.training and any(_drops_activations(parent) for parent in self.parents):
            return "activation dropout"
        return None

    def kept(self, adapter: str, row: int) -> Narrow:
        """Return the weights of exactly the neurons that one row of one adapter keeps."""
        mask = self._mask(adapter, row)
        return Narrow(self, adapter, mask.nonzero().flatten(), mask.new_empty(0, dtype=torch.long))

    def _mask(self, adapter: str, row: int) -> torch.Tensor:
        return unpack_rows(self.layer.neuron_specialization_mask[adapter][row], self.layer.out_features)

    def _computed(self, adapter: str, row: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return what Narrow asks for: kept neurons and those that fill the width up; the last few rows' are known."""
        packed = self.layer.neuron_specialization_mask[adapter]
        version = 0 if packed.is_inference() else packed._version
        known = self.looked_up.get((adapter, row))
        if known is None or known.packed is not packed or known.version != version:
            with torch.inference_mode(False):  # training may be next, and save the indices for its backward pass
                known = _LookedUp(packed, version, *_fill_up(self._mask(adapter, row)))
            self.looked_up[adapter, row] = known
            if len(self.looked_up) > LOOKED_UP:
                self.looked_up.pop(next(iter(self.looked_up)))
        return known.computed, known.filler


@dataclass
class _LookedUp:
    """The neurons to compute for one row of masks, and the masks they were read from."""

    packed: torch.Tensor
    version: int
    computed: torch.Tensor | None
    filler: torch.Tensor


def _fill_up(mask: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the neurons to compute for bool [d_ff], kept ones first (None for all), and which of them are filler."""
    kept, off = mask.nonzero().flatten(), (~mask).nonzero().flatten()
    filler = off[: -len(kept) % WIDTH_MULTIPLE]
    width = len(kept) + len(filler)
    if width == len(mask):
        return None, off
    return torch.cat((kept, filler)), torch.arange(len(kept), width, device=mask.device)


class _NarrowInput:
    """`forward` of a block's down projection."""

    def __init__(self, block: CompactBlock) -> None:
        self.block = block

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        down = self.block.down
        if x.shape[-1] == down.in_features:
            return F.linear(x, down.weight, down.bias)
        narrow = self.block.narrow(x)
        assert narrow is not None, "the block ran narrow a moment ago"
        return F.linear(x, *narrow.down)


class _NarrowOutput:
    """`forward` of a gated block's second projection."""

    def __init__(self, block: CompactBlock) -> None:
        self.block = block

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        narrow = self.block.narrow(x)
        if narrow is None or narrow.other is None:
            return F.linear(x, self.block.other.weight, self.block.other.bias)
        return F.linear(x, *narrow.other)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str, nn.Module]:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    return owner, child, getattr(owner, child)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        hasattr(module, "_hf_hook")  # accelerate moves weights in and out of the device
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
    )


def _records(module: nn.Module) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(isinstance(hook, CountingHook) for hook in hooks)


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
