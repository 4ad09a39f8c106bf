"""Masked execution, the arithmetic: compute all neurons, then replace the output of masked ones by their bias.

Under `update_only` no neuron is masked: the mask says which rows of ΔW1 are added to W1.

It works for every base layer, quantized and offloaded ones included, and for a mask row per sample. Compact execution,
which computes only the kept neurons, is in compact.
"""

from typing import Any

import torch
from torch.nn import functional as F

from ..neurons.adapter_file import unpack_rows
from .merging import is_plain_linear
from .pair_resolver import BASE_ROW

_NO_SAMPLES = (
    "in one batch need inputs of shape [batch, length, d_model], but this layer got {}, from which samples cannot be "
    "told apart (an expert gets tokens in another order). Run one per batch."
)


def forward_masked(
    layer: Any, x: torch.Tensor, adapters: list[str], samples: torch.Tensor | None = None, batch: int | None = None
) -> torch.Tensor:
    """Project x to [..., d_ff] under several adapters: their deltas add up, and a neuron must be kept by each of them.

    An adapter with `update_only` adds its delta to the neurons that it keeps, and masks none.

    Args:
        layer: the layer around a masked projection.
        x: [batch, ..., d_model] ([length, batch, d_model] in time-major models), or some samples of it.
        adapters: names of the adapters.
        samples: where x is part of a batch, int64 indices of its samples in the whole.
        batch: size of the whole batch, beams counted.

    Raises:
        ValueError: if several language pairs are in a batch whose samples cannot be told apart.
    """
    keeps: dict[str, torch.Tensor] = {}
    added_to: dict[str, torch.Tensor] = {}
    for adapter in adapters:
        rows = layer.call(x.device).rows_in(adapter, layer.stack, x.device)
        if len(rows.index) > 1 and x.ndim < 3:
            raise ValueError(f"Several language pairs {_NO_SAMPLES.format(list(x.shape))}")
        index = _per_sample(rows.index, batch or x.shape[_batch_dim(layer)])
        if samples is not None and len(index) > 1:
            index = index[samples]
        packed = layer.neuron_specialization_mask[adapter].to(x.device)[index.clamp_min(0)]
        keeps[adapter] = _align(layer, unpack_rows(packed, layer.out_features), x)
        if rows.has_base:
            routed = _align(layer, (index != BASE_ROW)[:, None], x)
            added_to[adapter] = routed & keeps[adapter] if layer.update_only[adapter] else routed
            keeps[adapter] = keeps[adapter] | ~routed
        elif layer.update_only[adapter]:
            added_to[adapter] = keeps[adapter]
    out = _project(layer, x, adapters, added_to)
    # where adapters differ, a neuron that one of them sets to 0 is 0, in whatever order they were activated
    masking = [adapter for adapter in adapters if not layer.update_only[adapter]]
    for adapter in sorted(masking, key=lambda adapter: layer.mask_bias[adapter]):
        bias = None if layer.mask_bias[adapter] else _base_bias(layer, x)
        out = torch.where(keeps[adapter], out, 0 if bias is None else bias.to(out.dtype))
    return out


def forward_per_sample_adapters(layer: Any, x: torch.Tensor, names: list[str]) -> torch.Tensor:
    """PEFT's `adapter_names`: one adapter per sample, "__base__" for none. Errors read as those of PEFT's LoRA."""
    if layer.merged:
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    if layer.compact_block is not None and x.ndim < 3:  # an FFN block without samples is an expert
        if len(set(names)) > 1:
            raise ValueError(f"Several adapters {_NO_SAMPLES.format(list(x.shape))}")
        names = names[:1]
    dim = _batch_dim(layer)
    batch = x.shape[dim]
    if batch % len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {batch} respectively."
        )
    out = layer.base_layer(x)
    known = {name: i for i, name in enumerate(layer.mask_bias)}
    ids = torch.tensor([known.get(name, -1) for name in names], device=x.device)
    ids = ids.repeat_interleave(batch // len(names))  # once per beam
    for adapter in dict.fromkeys(name for name in names if name in known):
        samples = (ids == known[adapter]).nonzero().flatten()
        masked = forward_masked(layer, x.index_select(dim, samples), [adapter], samples, batch)
        out = out.index_copy(dim, samples, masked.to(out.dtype))
    return out


def _project(layer: Any, x: torch.Tensor, adapters: list[str], added_to: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return x (W1 + Σ ΔW1)ᵀ + b1: in weight space, unless the base is not a plain linear layer or samples differ.

    Args:
        layer: the layer around a masked projection.
        x: input.
        adapters: names of the adapters that add up.
        added_to: adapter name → bool, broadcastable over the output: the neurons of samples that its delta is added
            to. Adapters that are not in it add theirs to all.
    """
    deltas, per_sample = [], []
    for name in adapters:
        delta, where = layer.delta(name), added_to.get(name)
        if delta is None:
            continue
        if where is None:
            deltas.append(delta)
        elif where.ndim == 1:  # all samples alike
            deltas.append(torch.where(where[:, None], delta, 0))
        else:
            per_sample.append((where, delta))
    if not deltas:
        out = layer.base_layer(x)
    else:
        total = deltas[0] if len(deltas) == 1 else torch.stack(deltas).sum(0)
        if is_plain_linear(layer.base_layer) and "forward" not in vars(layer.base_layer):
            out = F.linear(x, (layer.weight + total).to(layer.weight.dtype), layer.bias)
        else:
            out = layer.base_layer(x) + F.linear(x, total.to(x))
    for where, delta in per_sample:
        out = out + torch.where(where, F.linear(x, delta.to(x)), 0)
    return out


def _base_bias(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """Return b1 [d_ff]; where it cannot be read (offloaded, or in a quantized module), what zeros project to."""
    base: Any = layer.get_base_layer()
    bias = getattr(base, "bias", None)
    if bias is None or (isinstance(bias, torch.Tensor) and not bias.is_meta):
        return bias
    return base(x.new_zeros(1, layer.in_features))[0]


def _per_sample(values: torch.Tensor, batch: int) -> torch.Tensor:
    """Repeat each sample's value for each of its beams; a single value, for the whole batch, stays one."""
    if batch % len(values):
        raise ValueError(
            f"Got language pairs for {len(values)} samples, but a batch of {batch}. Pass one per sample, or a "
            "single one for the whole batch."
        )
    return values if len(values) in (1, batch) else values.repeat_interleave(batch // len(values))


def _batch_dim(layer: Any) -> int:
    return 1 if layer.router.time_major else 0


def _align(layer: Any, per_sample: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Shape [1 or batch, width] so that it broadcasts over x's projection."""
    if len(per_sample) == 1:
        return per_sample[0]
    if layer.router.time_major:
        return per_sample
    return per_sample.reshape(len(per_sample), *[1] * (x.ndim - 2), per_sample.shape[-1])
