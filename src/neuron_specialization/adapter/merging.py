"""Merging: the masked, trained projection of one language pair as the weight of its base layer."""

from typing import Any

import torch
from torch import nn

from ..neurons.adapter_file import unpack_rows
from ..neurons.ffn import STACKS
from .call import Call
from .pair_resolver import BASE_ROW


def check_merge(model: nn.Module, layer_class: type, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Check that every masked layer of a model can be merged, before any is.

    Args:
        model: model with masked layers.
        layer_class: their class.
        adapter_names: adapters to merge, None for the active ones.
        safe_merge: also compute every merged weight, to check that it is finite.

    Raises:
        ValueError: as `merged_weights` does, and if a weight is tied to another module's.
    """
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), []).append(name.removesuffix(".base_layer"))
    for layer in model.modules():
        if not isinstance(layer, layer_class):
            continue
        masked: Any = layer
        names = masked.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in masked.mask_bias and name not in masked.merged_adapters]
        if not names:
            continue
        check_mergeable(masked, names)
        for parameter in masked.get_base_layer().parameters(recurse=False):
            tied = users[id(parameter)]
            if len(tied) > 1:
                raise ValueError(
                    f"Cannot merge: {' and '.join(tied)} share one {'weight' if parameter.ndim > 1 else 'bias'}, "
                    "which cannot hold the masks of one of them only. Keep the adapter unmerged, or untie the base "
                    "first."
                )
        if safe_merge:
            merged_weights(masked, [*masked.merged_adapters, *names], safe_merge)


def merged_weights(
    layer: Any, adapters: list[str], safe_merge: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight and bias under `adapters`, computed from the unmerged ones so that unmerging is exact.

    Raises:
        ValueError: if an adapter has several pairs and none is set, or the base is what is set; if the weight is
            sharded or not plain; and, with `safe_merge`, if the merged weight is not finite.
    """
    check_mergeable(layer, adapters)
    original, bias = layer.unmerged_weights()
    kept = torch.ones(layer.out_features, dtype=torch.bool, device=original.device)
    weight = original
    for adapter in adapters:
        packed = layer.neuron_specialization_mask[adapter][merged_row(layer, adapter)]
        mask = unpack_rows(packed, layer.out_features).to(kept.device)
        delta = layer.delta(adapter)
        if delta is not None:
            delta = delta.detach().to(original.device)
            weight = weight + (torch.where(mask[:, None], delta, 0) if layer.update_only[adapter] else delta)
        if not layer.update_only[adapter]:
            kept &= mask
        if layer.mask_bias[adapter] and bias is not None:
            bias = bias * mask
    weight = (weight * kept[:, None]).to(original.dtype)
    if safe_merge and not torch.isfinite(weight).all():
        raise ValueError(f"NaNs detected in the merged weights. The adapter {adapters[-1]} seems to be broken")
    return weight, bias


def merged_row(layer: Any, adapter: str) -> int:
    """Return the row of an adapter's masks that is merged, or would be: that of the pair set, or of the only one."""
    if adapter in layer.merged_rows:
        return layer.merged_rows[adapter]
    return layer.router.single_route(adapter)[STACKS.index(layer.stack)]


def check_merged_pair(layer: Any, call: Call) -> None:
    """Raise ValueError if a call passes, selects, or carries the tokens of another pair than the one merged."""
    for adapter, row in layer.merged_rows.items():
        resolver, rows = layer.router.resolvers.get(adapter), call.rows.get(adapter)
        if not isinstance(rows, tuple) or (call.pairs is None and resolver.reader is None):
            continue  # the call says nothing of its pair
        if rows[STACKS.index(layer.stack)].single != row:
            raise ValueError(
                f"Another language pair of the adapter {adapter!r} is merged into the weights than this call is for. "
                "Call unmerge_adapter() first."
            )


def check_mergeable(layer: Any, adapters: list[str]) -> None:
    """Raise ValueError unless the layer's weight is plain and each adapter has one pair to merge."""
    base: Any = layer.get_base_layer()
    if layer.base_layer is not base and not getattr(layer.base_layer, "merged", False):
        raise ValueError(
            f"Cannot merge: between the masks and their linear layer is a {type(layer.base_layer).__name__} of "
            "another adapter, whose update would escape them. Merge that one into the base first, or remove it."
        )
    if isinstance(getattr(base, "weight", None), torch.distributed.tensor.DTensor):
        raise ValueError("Cannot merge into a sharded weight (FSDP). Save the adapter and merge in one process.")
    if not is_plain_linear(base):
        raise ValueError(f"Cannot merge into this {type(base).__name__}: load the base model unquantized to merge.")
    for adapter in adapters:
        if layer.router.single_route(adapter)[0] == BASE_ROW:
            raise ValueError(
                "Merging writes one language pair into the weights, but the pair that is set, or the default pair, is "
                f"the untouched base. Choose a pair of the adapter {adapter!r} with ns.set_language_pair(model, ...)."
            )


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer is torch's own linear with nothing attached, so that its weight may be used directly."""
    if type(layer) is not nn.Linear or type(layer.weight.data) is not torch.Tensor:
        return False
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return not any(hooks)
