"""The masked projection: `act(m ⊙ (x W1ᵀ) + b1)` up to the activation, which the model applies itself.

A masked row of `W1` makes its neuron emit the constant `act(b1)`; masking the output of the projection is the same
thing and works for every base layer, quantized ones included.
"""

import math
import warnings
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional as F

from ..neurons.adapter_file import DELTA, DELTA_A, DELTA_B, MASK, pack_rows, unpack_rows
from ..neurons.ffn import STACKS
from . import frozen_rows
from .call import Call, innermost_call
from .compact import CompactBlock, CompactWeights
from .compact_policy import active_adapters, compact_row
from .config import NeuronSpecializationConfig
from .masked import forward_masked, forward_per_sample_adapters
from .merging import check_merged_pair, merged_row, merged_weights
from .routing import CallRouter

RANDOM_INIT_STD = 0.1


class NeuronSpecializationLayer(BaseTunerLayer):
    """State of the method on one projection: per adapter, packed mask rows and the trained delta."""

    adapter_layer_names = (DELTA, DELTA_A, DELTA_B)
    other_param_names = (MASK, "mask_bias", "update_only", "execution", "protected_rows")

    def __init__(self, base_layer: nn.Module, router: CallRouter, stack: str) -> None:
        self.base_layer = base_layer
        self.router = router
        self.stack = stack
        self.neuron_specialization_mask = BufferDict(persistent=True)
        self.neuron_specialization_delta = nn.ParameterDict()
        self.neuron_specialization_delta_a = nn.ParameterDict()
        self.neuron_specialization_delta_b = nn.ParameterDict()
        self.mask_bias: dict[str, bool] = {}
        self.update_only: dict[str, bool] = {}
        self.execution: dict[str, str] = {}
        self.protected_rows: dict[str, list[int]] = {}  # adapter → mask rows of the pairs that must not change
        self.place: tuple[nn.Module, str] | None = None  # its parent, and its name there
        self.compact_block: CompactBlock | None = None
        self.trains_base = False
        self.merged_adapters = []
        self.merged_rows: dict[str, int] = {}
        self._unmerged: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._looked_up: dict[str | None, tuple[list[torch.Tensor], list[int], torch.Tensor]] = {}
        linear: Any = self.get_base_layer()
        self.in_features: int = linear.in_features
        self.out_features: int = linear.out_features

    def update_layer(self, adapter_name: str, mask: torch.Tensor, config: NeuronSpecializationConfig) -> None:
        """Add an adapter. `mask` is bit-packed: uint8 [rows, ceil(d_ff / 8)]."""
        self.neuron_specialization_mask[adapter_name] = mask
        self.mask_bias[adapter_name] = config.mask_bias
        self.update_only[adapter_name] = config.update_only
        self.execution[adapter_name] = config.execution
        if config.trainable == "full":
            self.trains_base = True
        if config.protected_pairs:
            routes, side = config.build_routes(), STACKS.index(self.stack)
            self.protected_rows[adapter_name] = [routes.route(pair)[side] for pair in config.protected_pairs]
        frozen_rows.protect(self)
        shape = (self.out_features, self.in_features)
        if config.trainable == "delta":
            delta = torch.zeros(shape) if config.init_weights else torch.randn(shape) * RANDOM_INIT_STD
            self.neuron_specialization_delta[adapter_name] = nn.Parameter(delta)
        elif config.trainable == "low_rank":
            a, b = torch.empty(config.r, shape[1]), torch.zeros(shape[0], config.r)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            if not config.init_weights:
                nn.init.normal_(b, std=RANDOM_INIT_STD)
            self.neuron_specialization_delta_a[adapter_name] = nn.Parameter(a)
            self.neuron_specialization_delta_b[adapter_name] = nn.Parameter(b)
        weight = self.weight
        if isinstance(weight, torch.Tensor) and not weight.is_meta:  # neither quantized nor offloaded
            self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and its routes with the first of its layers."""
        frozen_rows.release(self)
        super().delete_adapter(adapter_name)
        if self.compact_block is not None:
            self.compact_block.looked_up.clear()
        self.router.forget(adapter_name)
        self._looked_up.pop(adapter_name, None)
        self.trains_base = False  # an adapter that trains the base is the only one
        frozen_rows.protect(self)

    def replace_mask(self, adapter_name: str, rows: torch.Tensor) -> None:
        """Replace an adapter's mask rows, bool [rows, d_ff], by others of the same shape."""
        packed = self.neuron_specialization_mask[adapter_name]
        packed.copy_(pack_rows(rows))  # in place: what was looked up of the old rows knows by the tensor's version

    def _get_available_adapters(self) -> set[str]:
        return set(self.neuron_specialization_mask.keys())

    def delta(self, adapter_name: str, rows: torch.Tensor | None = None) -> torch.Tensor | None:
        """Return ΔW1 [d_ff, d_model] of one adapter, or some rows of it; None where the adapter has none."""
        if adapter_name in self.neuron_specialization_delta:
            delta = _loaded(self.neuron_specialization_delta, adapter_name)
            if adapter_name in self.protected_rows and delta.requires_grad and torch.is_grad_enabled():
                frozen = self.frozen_neurons(adapter_name, delta.device)
                # no gradient: that of rows which do not move would count in the norm that gradients are clipped by
                delta = delta.index_copy(0, frozen, delta.detach().index_select(0, frozen))
            return delta if rows is None else delta.index_select(0, rows)
        if adapter_name in self.neuron_specialization_delta_a:
            b, a = (
                _loaded(factors, adapter_name)
                for factors in (self.neuron_specialization_delta_b, self.neuron_specialization_delta_a)
            )
            return (b if rows is None else b.index_select(0, rows)) @ a
        return None

    def call(self, device: torch.device | None = None) -> Call:
        """Return the call that is running, or a new one where this layer is called outside its model."""
        return innermost_call(self.router) or self.router.begin_alone(device)

    def release(self) -> None:
        """Undo what this layer changed outside itself, before it is removed."""
        frozen_rows.release(self)
        if self.compact_block is not None:
            self.compact_block.release()

    def zeroes_masked(self) -> bool:
        """Whether masked neurons output 0, their bias masked too, under the active adapter."""
        return any(self.mask_bias[name] for name in self.active_adapters if name in self.mask_bias)

    def partly_frozen(self) -> dict[str | None, torch.Tensor]:
        """Return the weights that have rows which must not move: W1 under None, ΔW1 under its adapter's name.

        W1 may have been quantized since, or be described without weights; then it is not among them.
        """
        weights: dict[str | None, Any] = {None: self.weight} if self.trains_base else {}
        weights |= {name: self.neuron_specialization_delta[name] for name in self.protected_rows}
        return {name: w for name, w in weights.items() if isinstance(w, torch.Tensor) and not w.is_meta}

    def frozen_neurons(self, adapter_name: str | None, device: torch.device) -> torch.Tensor:
        """Return the neurons whose rows of an adapter's ΔW1, or of W1 (None), must not move: int64 [n].

        Of ΔW1 these are the neurons that a protected pair keeps, of W1 those that no pair of any adapter keeps. They
        are looked up once per masks.
        """
        table = self.neuron_specialization_mask
        masks = list(table.values()) if adapter_name is None else [table[adapter_name]]
        versions = [0 if packed.is_inference() else packed._version for packed in masks]
        known = self._looked_up.get(adapter_name)
        if known is not None and known[1] == versions and known[2].device == device:
            if len(known[0]) == len(masks) and all(a is b for a, b in zip(known[0], masks, strict=True)):
                return known[2]
        kept = torch.zeros(self.out_features, dtype=torch.bool, device=device)
        for packed in masks:
            rows = packed if adapter_name is None else packed[self.protected_rows[adapter_name]]
            kept |= unpack_rows(rows, self.out_features).any(0).to(device)
        neurons = (~kept if adapter_name is None else kept).nonzero().flatten()
        self._looked_up[adapter_name] = masks, versions, neurons
        return neurons


class Linear(nn.Module, NeuronSpecializationLayer):
    """A masked projection around any linear base layer."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, router: CallRouter, stack: str) -> None:
        super().__init__()
        NeuronSpecializationLayer.__init__(self, base_layer, router, stack)
        self._active_adapter = adapter_name

    def __getstate__(self) -> dict[str, Any]:
        frozen_rows.put_back()  # a copy would hold what is moved now
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        frozen_rows.protect(self)  # copies and unpickled layers like the first one

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        frozen_rows.put_back()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        frozen_rows.put_back()  # later it would undo the loading
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Project x [..., d_model] to [..., d_ff] under the masks of the current language pairs."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        self._check_place()
        call = self.call(x.device)
        if call.adapter_names is not None:
            return forward_per_sample_adapters(self, x, call.adapter_names)
        if self.merged:
            check_merged_pair(self, call)
            return self.base_layer(x, *args, **kwargs)
        weights = self._compact_weights(x, call)
        if weights is not None:
            return F.linear(x, *weights.up())
        return forward_masked(self, x, active_adapters(self))

    def _check_place(self) -> None:
        """Raise ValueError where another adapter was put around this layer, whose output would not be masked."""
        outer = self if self.place is None else getattr(*self.place)
        if outer is self or not isinstance(outer, BaseTunerLayer) or outer.disable_adapters or outer.merged:
            return
        names = [name for name in outer.active_adapters if name in outer._all_available_adapter_names()]
        if names:
            raise ValueError(
                f"The adapter {names[0]!r} was added to a masked projection after the masks, so what it adds would "
                "not be masked. Add it before the masks, or leave masked projections out of its target_modules."
            )

    def _compact_weights(self, x: torch.Tensor, call: Call) -> CompactWeights | None:
        """Return the weights to run with where the block runs compact."""
        if self.compact_block is not None:
            return self.compact_block.decide(self, x, call)
        if not torch.compiler.is_compiling():
            compact_row(self, call, x)  # raises where compact execution is requested
        return None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the masked, trained projection of one language pair into the base layer; see `merged_weights`."""
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.mask_bias]
        if not names:
            return
        frozen_rows.put_back()
        merged = [*self.merged_adapters, *names]
        weight, bias = merged_weights(self, merged, safe_merge)
        self.merged_rows = {name: merged_row(self, name) for name in merged}
        base: Any = self.get_base_layer()
        if self._unmerged is None:  # the merged weight is a tensor of its own, the bias may be the same one
            self._unmerged = (base.weight.data, None if base.bias is None else base.bias.data.clone())
        base.weight.data = weight
        if base.bias is not None and bias is not None:
            base.bias.data = bias
        self.merged_adapters.extend(names)

    def unmerged_weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return weight and bias of the base layer as they were before any merge."""
        if self._unmerged is not None:
            return self._unmerged
        base: Any = self.get_base_layer()
        return base.weight.data, None if base.bias is None else base.bias.data

    def unmerge(self) -> None:
        """Put the weights back that `merge` replaced, in the type and on the device that the model has now."""
        if not self.merged or self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: Any = self.get_base_layer()
        weight, bias = self._unmerged
        base.weight.data = weight.to(base.weight)
        if bias is not None:
            base.bias.data = bias.to(base.bias)
        self.merged_adapters.clear()
        self.merged_rows.clear()
        self._unmerged = None

    def __repr__(self) -> str:
        return "neuron_specialization." + super().__repr__()


def _loaded(parameters: nn.ParameterDict, adapter: str) -> torch.Tensor:
    """Return a parameter, loading it where accelerate offloaded it: its hook runs in `forward` only."""
    if parameters[adapter].is_meta and hasattr(parameters, "_hf_hook"):
        hook: Any = parameters._hf_hook
        hook.pre_forward(parameters)
        loaded = parameters[adapter]
        hook.post_forward(parameters, None)
        return loaded
    return parameters[adapter]
