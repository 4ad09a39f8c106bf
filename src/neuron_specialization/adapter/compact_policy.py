"""Compact execution, the policy: whether a block may run compact, and whether it pays.

`why_masked` is the one place that says why a block ran masked.
"""

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..neurons.ffn import DECODER
from ..neurons.recorder import CountingHook
from .call import Call
from .pair_resolver import BASE_ROW

if TYPE_CHECKING:
    from .compact import CompactBlock

# When compact execution pays, measured on a CPU at d_model 1,024. Not measured on a GPU yet (`make benchmark-gpu`
# does); if its figures differ, there should be one per kind of device here.
WIDTH_MULTIPLE = 16  # in float32, one 64-byte line; matrix products of other widths were 6 % slower
FEW_TOKENS = 256  # below, gathering weights for one use costs more than it saves


class WhyMasked(NamedTuple):
    """Why a block runs masked.

    Attributes:
        reason: what stands in the way, for messages.
        warns: whether execution="auto" gives a warning, once per model.
        overrides: whether the block runs masked even with execution="compact", instead of raising.
    """

    reason: str
    warns: bool = False
    overrides: bool = False


def compact_row(layer: Any, call: Call, x: torch.Tensor) -> tuple[str, int] | None:
    """Return the adapter and the row of masks that a block runs compact with on x [..., d_model]; None to run masked.

    Raises:
        ValueError: if execution="compact" requests it and it is not possible.
    """
    why = why_masked(layer, call, x)
    if why is None:
        return single_row(layer, call)
    requested = any(layer.execution[name] == "compact" for name in active_adapters(layer))
    if requested and not why.overrides:
        raise ValueError(
            f"execution='compact' is not possible here because of {why.reason}: it needs an FFN block with plain "
            "weights and one language pair in the batch. Use execution='auto' to run masked in such cases."
        )
    if why.warns and not layer.router.warned:
        layer.router.warned = True
        warnings.warn(f"FFN blocks run masked, not compact, because of {why.reason}.", stacklevel=2)
    return None


def why_masked(layer: Any, call: Call, x: torch.Tensor) -> WhyMasked | None:
    """Return why the block of a masked projection runs masked on inputs like `x`, or None where it runs compact."""
    active = active_adapters(layer)
    if layer.disable_adapters or layer.merged:
        return WhyMasked("the adapter being disabled or merged", overrides=True)
    if call.adapter_names is not None:
        return WhyMasked("adapter_names", overrides=True)
    if all(layer.execution[name] == "masked" for name in active):
        return WhyMasked("execution='masked'", overrides=True)
    if layer.compact_block is None:
        return WhyMasked("a masked projection outside of any FFN block")
    # before the batch is looked at: whether a warning is given must not depend on the first batch
    why = why_not_compact(layer.compact_block)
    if why is not None:
        return why
    if call.alone:
        return WhyMasked("a layer that is called by itself, outside of its model")
    if single_row(layer, call) is None:
        return WhyMasked("several active adapters, several language pairs in the batch, or the untouched base")
    if layer.execution[active[0]] == "auto" and not _pays(layer, call, x):
        return WhyMasked("few tokens")
    return None


def why_not_compact(block: "CompactBlock") -> WhyMasked | None:
    """Return what in the model keeps a block from running compact, whatever the batch, or None.

    Nothing else may be attached to it, its weights must be plain, and all between its projections elementwise.
    """
    layer, base = block.layer, block.layer.base_layer
    projections: list[Any] = [part for part in (base, block.down, block.other) if part is not None]
    if type(base) is not nn.Linear or not block.installed or not all(_is_plain(part.weight) for part in projections):
        return WhyMasked("weights that are not plain tensors", warns=True)
    if "forward" in vars(base):
        return WhyMasked("a projection with a forward of its own", warns=True)
    if any(layer.update_only[name] for name in active_adapters(layer)):
        return WhyMasked("update_only=True, under which no neuron is masked")
    if not block.elementwise:
        return WhyMasked("an operation between the projections that is not elementwise", warns=True)
    if any(_records(part) for part in [*projections, layer]):
        return WhyMasked("activations being recorded", overrides=True)
    activation = [block.activation] if isinstance(block.activation, nn.Module) else []
    if any(_has_hooks(part) for part in [*projections, *activation, layer]):
        return WhyMasked("hooks on its projections or activation", warns=True)
    if any(getattr(parent, name) is not part for parent, name, part in block.places):
        return WhyMasked("another adapter on its projections", warns=True)
    if block.other is not None and base.bias is not None and not layer.zeroes_masked():
        return WhyMasked("a gate with a bias, whose masked neurons emit no constant", warns=True)
    if block.other is not None and not block.zero_at_zero:
        return WhyMasked("a gated activation that is not zero at zero, so masked neurons do not output 0", warns=True)
    if layer.training and any(_drops_activations(parent) for parent in block.parents):
        return WhyMasked("activation dropout", warns=True)
    return None


def active_adapters(layer: Any) -> list[str]:
    """Return the active ones among a layer's adapters of this method."""
    return [name for name in layer.active_adapters if name in layer.mask_bias]


def single_row(layer: Any, call: Call) -> tuple[str, int] | None:
    """Return the only active adapter and its row of the batch; None where there are several, or it is the base's."""
    active = active_adapters(layer)
    row = call.rows_in(active[0], layer.stack).single if len(active) == 1 else None
    return None if row is None or row == BASE_ROW else (active[0], row)


def takes_many_steps(layer: Any, call: Call) -> bool:
    """Whether the block runs again and again with the same weights: in the decoder steps of a `generate`."""
    return call.generates and layer.stack == DECODER


def _pays(layer: Any, call: Call, x: torch.Tensor) -> bool:
    """Whether gathering saves time: it does for many tokens, or many decoder steps."""
    return takes_many_steps(layer, call) or x.numel() // x.shape[-1] >= FEW_TOKENS


def _is_plain(weight: Any) -> bool:
    """Whether a weight is a tensor of torch's own kind: not sharded, not quantized (there it may even be a method)."""
    return isinstance(weight, torch.Tensor) and type(weight.data) is torch.Tensor


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


def _drops_activations(parent: nn.Module) -> bool:
    """Whether there is dropout between the projections: it would drop the constants of masked neurons too."""
    rates = [child.p for child in parent.children() if isinstance(child, nn.Dropout)]
    return any(rate > 0 for rate in [*rates, getattr(parent, "activation_dropout", 0.0)])
