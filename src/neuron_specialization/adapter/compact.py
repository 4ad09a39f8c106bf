"""Compact execution, the arithmetic: compute only the neurons that a language pair keeps.

A masked neuron emits the constant `act(b1)`, so it can be cut out of a block without changing what the block computes:
the up projection computes the kept rows of W1, the down projection reads the kept columns of W2, and
`W2[:, off] · act(b1[off])` joins the bias. In gated blocks a masked neuron outputs 0. Outputs and gradients are those
of the masked path.

A few masked neurons are computed too, with zero rows of W1, to pad the width to a multiple for which matrix products
are fast; where that is the whole block, nothing is gathered.

Whether a block runs compact is decided in compact_policy.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..neurons.adapter_file import unpack_rows
from ..neurons.ffn import FfnBlock
from . import compact_policy
from .call import Call, innermost_call

LOOKED_UP = 64  # rows of masks whose neurons a block remembers: 0.5 MB per block at 1,000 neurons each

Weights = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, eq=False)
class CompactWeights:
    """The weights of one block for one row of masks, each gathered when it is asked for.

    Attributes:
        block: the block.
        adapter: name of the adapter.
        computed: indices of the neurons that are computed, int64 [computed]; None for all of the block's.
        filler: indices among them of masked neurons, which only pad the width, int64.
        gathered: keeps what is gathered for later steps; None to gather each time.
    """

    block: "CompactBlock"
    adapter: str
    computed: torch.Tensor | None
    filler: torch.Tensor
    gathered: dict[str, Weights] | None = None

    def up(self) -> Weights:
        """Return [computed, d_model] and bias [computed] of the masked projection."""
        return self._once("up", self._gather_up)

    def other(self) -> Weights:
        """Return likewise those of a gated block's second projection."""
        other = self.block.other
        return self._once("other", lambda: (self._take(other.weight), _take_bias(self, other.bias)))

    def down(self) -> Weights:
        """Return [d_model, computed], and the bias b2 + W2[:, off] · act(b1[off]), off being the neurons cut out."""
        return self._once("down", self._gather_down)

    def _once(self, name: str, gather: Callable[[], Weights]) -> Weights:
        if self.gathered is None:
            return gather()
        if name not in self.gathered:
            self.gathered[name] = gather()
        return self.gathered[name]

    def _take(self, values: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return values if self.computed is None else values.index_select(dim, self.computed)

    def _gather_up(self) -> Weights:
        base: Any = self.block.layer.base_layer
        weight, bias = self._take(base.weight), _take_bias(self, base.bias)
        delta = self.block.layer.delta(self.adapter, self.computed)
        if delta is not None:
            weight = (weight + delta).to(weight.dtype)
        if len(self.filler):
            weight = weight.index_fill(0, self.filler, 0)
            if bias is not None and self.block.layer.zeroes_masked():
                bias = bias.index_fill(0, self.filler, 0)
        return weight, bias

    def _gather_down(self) -> Weights:
        block, down = self.block, self.block.down
        weight = self._take(down.weight, 1)
        # neurons that output 0 add nothing; in a gated block that runs compact, all masked neurons do
        bias = None if block.layer.zeroes_masked() else block.layer.base_layer.bias
        if self.computed is None or block.other is not None or (bias is None and block.zero_at_zero):
            return weight, down.bias
        emitted = block.activation(down.weight.new_zeros(down.in_features) if bias is None else bias)
        constant = down.weight @ emitted.index_fill(0, self.computed, 0)
        return weight, constant if down.bias is None else down.bias + constant


def _take_bias(weights: CompactWeights, bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else weights._take(bias)


class CompactBlock:
    """One FFN block that can run compact. It belongs to the layer around the block's masked projection.

    The block's other projections, which the model keeps calling, become `CompactLinear`s: the same modules, with the
    same parameters under the same names, but they run with the weights that the block decided on.
    """

    def __init__(
        self, layer: Any, block: FfnBlock, model: nn.Module, names: Mapping[nn.Module, Sequence[str]]
    ) -> None:
        self.layer = layer
        self.activation = block.activation
        self.down: Any = block.down
        self.other: Any = block.up if block.gate is not None else None
        parts: list[Any] = [part for part in (self.down, self.other) if part is not None]
        self.places = [_place(model, names[part][0]) for part in parts]
        self.parents = list({id(parent): parent for parent, _, _ in self.places}.values())
        self.looked_up: dict[tuple[str, int], _LookedUp] = {}
        self.elementwise = not any(_mixes_neurons(child, block.d_ff) for p in self.parents for child in p.children())
        # what is no plain linear layer stays what it is, and the block always runs masked
        self.installed = all(type(part) is nn.Linear and "forward" not in vars(part) for part in parts)
        if self.installed:
            for part in parts:
                part.__class__ = CompactLinear  # in place: references, hooks and saved keys stay what they are
                part.compact_block = self

    @cached_property
    def zero_at_zero(self) -> bool:
        """Whether the activation is zero at zero."""
        return not bool(self.activation(self.down.weight.new_zeros(1)).any())

    def release(self) -> None:
        """Make the projections plain linear layers again."""
        for part in (self.down, self.other) if self.installed else ():
            if part is not None:
                part.__class__ = nn.Linear
                del part.compact_block
        self.installed = False

    def decide(self, projection: nn.Module, x: torch.Tensor, call: Call) -> CompactWeights | None:
        """Decide how the block runs on inputs like `x`, and hand that on to its other projections.

        In gated blocks two projections read `x`; the one that runs first decides for both.

        Args:
            projection: the projection that asks.
            x: its input, [..., d_model].
            call: the call that is running.

        Returns:
            The weights to run with, or None for all of the block's own.
        """
        if torch.compiler.is_compiling():
            return None
        handed_on = call.handed_on.get(id(self))
        # what the same projection decided is left from a pass that was cut off: by an error, or in recomputation,
        # which stops as soon as the backward pass has what it needs
        if handed_on is not None and projection not in handed_on.seen_by:
            handed_on.seen_by.append(projection)
            return handed_on.weights
        row = compact_policy.compact_row(self.layer, call, x)
        weights = None if row is None else self._weights(call, *row)
        call.handed_on[id(self)] = HandedOn(weights, [projection])
        return weights

    def _weights(self, call: Call, adapter: str, row: int) -> CompactWeights:
        """Return the weights for one row of masks.

        The decoder steps of one `generate` share what was gathered. Between calls nothing is kept: weights may be
        written to in ways that leave no trace.
        """
        gathered = None
        if compact_policy.takes_many_steps(self.layer, call) and not torch.is_grad_enabled():
            gathered = call.compact_weights.setdefault((id(self), adapter, row), {})
        return CompactWeights(self, adapter, *self._computed(adapter, row), gathered)

    def kept(self, adapter: str, row: int) -> CompactWeights:
        """Return the weights of exactly the neurons that one row of one adapter keeps."""
        mask = self._mask(adapter, row)
        return CompactWeights(self, adapter, mask.nonzero().flatten(), mask.new_empty(0, dtype=torch.long))

    def _mask(self, adapter: str, row: int) -> torch.Tensor:
        return unpack_rows(self.layer.neuron_specialization_mask[adapter][row], self.layer.out_features)

    def _computed(self, adapter: str, row: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return what CompactWeights needs: kept neurons and filler, remembered for the last few rows of masks."""
        packed = self.layer.neuron_specialization_mask[adapter]
        version = 0 if packed.is_inference() else packed._version
        known = self.looked_up.get((adapter, row))
        if known is None or known.packed is not packed or known.version != version:
            with torch.inference_mode(False):  # training may be next, and save the indices for its backward pass
                known = _LookedUp(packed, version, *_fill_up(self._mask(adapter, row)))
            self.looked_up[adapter, row] = known
            if len(self.looked_up) > LOOKED_UP:
                self.looked_up.pop(list(self.looked_up)[0], None)  # None: another thread may have removed it
        return known.computed, known.filler


@dataclass
class HandedOn:
    """What a block decided on in one pass.

    Attributes:
        weights: those to run with; None for all of the block's own.
        seen_by: the projections that asked so far.
    """

    weights: CompactWeights | None
    seen_by: list[nn.Module]


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
    filler = off[: -len(kept) % compact_policy.WIDTH_MULTIPLE]
    width = len(kept) + len(filler)
    if width == len(mask):
        return None, off
    return torch.cat((kept, filler)), torch.arange(len(kept), width, device=mask.device)


class CompactLinear(nn.Linear):
    """The down projection of a block that can run compact, or the second projection of a gated one."""

    compact_block: CompactBlock

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        """Copied by itself (PEFT does, for `modules_to_save`) it is a plain linear layer: its block stays behind."""
        alone = not memo and type(self) is CompactLinear  # torch's parametrizations make classes of their own
        kind = nn.Linear if alone else type(self)
        state = {name: value for name, value in vars(self).items() if not alone or name != "compact_block"}
        copied = kind.__new__(kind)
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(state, memo))
        return copied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project x [..., all neurons, or those computed] to [..., d_model], or x [..., d_model] to neurons."""
        weights = None
        # accelerate's hooks keep this forward when the block is released
        block: CompactBlock | None = getattr(self, "compact_block", None)
        call = None if block is None else innermost_call(block.layer.router)
        if block is not None and call is not None and not torch.compiler.is_compiling():
            if self is block.other:
                weights = block.decide(self, x, call)
                return F.linear(x, *((self.weight, self.bias) if weights is None else weights.other()))
            handed_on = call.handed_on.pop(id(block), None)
            weights = None if handed_on is None else handed_on.weights
        return F.linear(x, *((self.weight, self.bias) if weights is None else weights.down()))


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str, nn.Module]:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    return owner, child, getattr(owner, child)


def _mixes_neurons(module: nn.Module, d_ff: int) -> bool:
    """Whether a module next to the projections combines the neurons of a position: a norm over them."""
    shape = getattr(module, "normalized_shape", None)
    weight = getattr(module, "weight", None)
    width = shape[-1] if shape else (weight.shape[-1] if isinstance(weight, torch.Tensor) and weight.ndim == 1 else 0)
    return width == d_ff
