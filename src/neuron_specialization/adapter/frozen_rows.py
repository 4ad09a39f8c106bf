"""Keep rows of W1 that no language pair selects where they are, whatever the optimizer does.

In `trainable="full"` their gradient is zero, but weight decay would shrink them and momentum from before would move
them. Each optimizer step therefore saves and restores them.
"""

import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_protected: "weakref.WeakSet[Any]" = weakref.WeakSet()
_saved: "weakref.WeakKeyDictionary[torch.optim.Optimizer, list[tuple]]" = weakref.WeakKeyDictionary()
_registered = False


def protect(layer: Any) -> None:
    """Hold the unselected rows of a masked layer's base weight still under every optimizer of this process."""
    global _registered
    _protected.add(layer)
    if not _registered:
        register_optimizer_step_pre_hook(_save)
        register_optimizer_step_post_hook(_restore)
        _registered = True


def _save(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    layers = [layer for layer in _protected if id(layer.weight) in stepped and layer.weight.requires_grad]
    rows = [_here(layer.weight.detach(), layer.unselected_rows()) for layer in layers]
    _saved[optimizer] = [(weight, index, weight[index]) for weight, index in rows if len(index)]


def _here(weight: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the part of a weight that this process holds, and which of `rows` are in it, by their place there."""
    if not isinstance(weight, DTensor):
        return weight, rows
    dim = next(i for i, placement in enumerate(weight.placements) if placement.is_shard(0))
    mesh, local = weight.device_mesh, weight.to_local()
    start = mesh.get_local_rank(dim) * -(-len(weight) // mesh.size(dim))  # shards are as large as torch.chunk's
    return local, rows[(rows >= start) & (rows < start + len(local))] - start


def _restore(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    with torch.no_grad():
        for weight, index, values in _saved.pop(optimizer, []):
            weight[index] = values
