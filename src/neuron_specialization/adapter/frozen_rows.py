"""Keep rows of W1 that no language pair selects unchanged, whatever the optimizer does.

In `trainable="full"` their gradient is zero, but weight decay would shrink them and momentum from before would move
them. Each optimizer step therefore saves and restores them. Optimizers that step on copies of the weights (master
weights of mixed precision) write the weights after their step: what they moved is put back when a model is called
next, and before a layer is saved, loaded, merged or removed.
"""

import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # weight, indices of rows, their values
_protected: "weakref.WeakSet[Any]" = weakref.WeakSet()
_saved: "weakref.WeakKeyDictionary[torch.optim.Optimizer, list[Rows]]" = weakref.WeakKeyDictionary()
_held: "weakref.WeakKeyDictionary[Any, Rows]" = weakref.WeakKeyDictionary()
_registered = False


def protect(layer: Any) -> None:
    """Protect the unselected rows of a masked layer's base weight from every optimizer of this process."""
    global _registered
    _protected.add(layer)
    if not _registered:
        register_optimizer_step_pre_hook(_save)
        register_optimizer_step_post_hook(_restore)
        _registered = True


def release(layer: Any) -> None:
    """Stop protecting a layer: its adapter is gone, and every row may train."""
    put_back()
    _protected.discard(layer)


def put_back() -> None:
    """Undo what optimizers that step on copies of the weights wrote into the unselected rows."""
    for layer, (before, index, values) in list(_held.items()):
        # the parameter may hold another tensor by now: one of the optimizer's, or a part of a sharded one
        weight = _local(layer.weight.detach()) if _has_weight(layer) else None
        if weight is not None and weight.shape == before.shape:
            _write([(weight, index, values)])
    _held.clear()


def _save(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    rows: list[Rows] = []
    for layers in _by_weight().values():
        # a weight may be shared by several layers: a row is frozen where none of them selects it
        index = layers[0].unselected_rows()
        for layer in layers[1:]:
            index = index[torch.isin(index, layer.unselected_rows())]
        weight, index = _here(layers[0].weight.detach(), index)
        if not len(index) or not weight.numel():
            continue
        if id(layers[0].weight) in stepped:
            rows.append((weight, index, weight[index]))
        elif not any(layer in _held for layer in layers):
            _held[layers[0]] = weight, index, weight[index]
    _saved[optimizer] = rows


def _by_weight() -> dict[int, list[Any]]:
    """Return the protected layers that train, grouped by their weight."""
    groups: dict[int, list[Any]] = {}
    for layer in _protected:
        if _has_weight(layer) and layer.weight.requires_grad:
            groups.setdefault(id(layer.weight), []).append(layer)
    return groups


def _has_weight(layer: Any) -> bool:
    """Whether a layer has a weight at hand: it may have been quantized since, or be described without weights."""
    return isinstance(layer.weight, torch.Tensor) and not layer.weight.is_meta


def _here(weight: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the part of a weight that this process holds, and which of `rows` are in it, by their place there."""
    if not isinstance(weight, DTensor):
        return weight, rows
    dim = next(i for i, placement in enumerate(weight.placements) if placement.is_shard(0))
    mesh, local = weight.device_mesh, _local(weight)
    start = mesh.get_local_rank(dim) * -(-len(weight) // mesh.size(dim))  # shards are as large as torch.chunk's
    return local, rows[(rows >= start) & (rows < start + len(local))] - start


def _local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _restore(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    _write(_saved.pop(optimizer, []))


def _write(rows: list[Rows]) -> None:
    with torch.no_grad():
        for weight, index, values in rows:
            weight[index] = values.to(weight)
