"""Keep rows of W1 or ΔW1 that must not train unchanged, whatever the optimizer does.

In `trainable="full"` these are the rows of W1 that no language pair selects, and under `protected_pairs` the rows of
ΔW1 that a protected pair selects. Their gradient is zero, but weight decay would shrink them and momentum from before
would move them. Each optimizer step therefore saves and restores them. Optimizers that step on copies of the weights
(master weights of mixed precision) write the weights after their step: what they moved is put back when a model is
called next, and before a layer is saved, loaded, merged or removed. Schedule-free ones keep a second copy ("z"), which
the weights become when they evaluate: its rows are restored too.
"""

import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # weight, indices of rows, their values
_protected: "weakref.WeakSet[Any]" = weakref.WeakSet()
_saved: "weakref.WeakKeyDictionary[torch.optim.Optimizer, list[Rows]]" = weakref.WeakKeyDictionary()
# layer → name of the weight, as `partly_frozen` calls it → rows
_held: "weakref.WeakKeyDictionary[Any, dict[str | None, Rows]]" = weakref.WeakKeyDictionary()
_registered = False


def protect(layer: Any) -> None:
    """Protect the frozen rows of a masked layer, if it has any, from every optimizer of this process."""
    global _registered
    if not layer.trains_base and not layer.protected_rows:
        return
    _protected.add(layer)
    if not _registered:
        register_optimizer_step_pre_hook(_save)
        register_optimizer_step_post_hook(_restore)
        _registered = True


def release(layer: Any) -> None:
    """Stop protecting a layer: every row may train."""
    put_back()
    _protected.discard(layer)


def put_back() -> None:
    """Undo what optimizers that step on copies of the weights wrote into the frozen rows."""
    for layer, held in list(_held.items()):
        weights = layer.partly_frozen()
        for name, (before, index, values) in held.items():
            # the parameter may hold another tensor by now: one of the optimizer's, or a part of a sharded one
            weight = _local(weights[name].detach()) if name in weights else None
            if weight is not None and weight.shape == before.shape:
                _write([(weight, index, values)])
    _held.clear()


def _save(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    rows: list[Rows] = []
    for users in _by_weight().values():
        # a weight may be shared by several layers: a row is frozen where it is frozen in all of them
        layer, name = users[0]
        parameter = layer.partly_frozen()[name]
        frozen = layer.frozen_neurons(name, parameter.device)
        for other, its_name in users[1:]:
            frozen = frozen[torch.isin(frozen, other.frozen_neurons(its_name, parameter.device))]
        weight, index = _here(parameter.detach(), frozen)
        if not len(index) or not weight.numel():
            continue
        if id(parameter) in stepped:
            rows.append((weight, index, weight[index]))
        elif not any(its_name in _held.get(user, {}) for user, its_name in users):
            _held.setdefault(layer, {})[name] = weight, index, weight[index]
    _saved[optimizer] = rows


def _by_weight() -> dict[int, list[tuple[Any, str | None]]]:
    """Return the partly frozen weights that train: for each, the layers that have it, and its name there."""
    users: dict[int, list[tuple[Any, str | None]]] = {}
    for layer in _protected:
        for name, weight in layer.partly_frozen().items():
            if weight.requires_grad:
                users.setdefault(id(weight), []).append((layer, name))
    return users


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
    rows = _saved.pop(optimizer, [])
    if not rows:
        return
    _write(rows)
    saved = {weight.data_ptr(): (index, values) for weight, index, values in rows}
    for parameter, state in optimizer.state.items():
        second = state.get("z") if isinstance(state, dict) else None
        start = _local(parameter.detach()).data_ptr() if second is not None else None
        if isinstance(second, torch.Tensor) and start in saved:
            _write([(_local(second), *saved[start])])


def _write(rows: list[Rows]) -> None:
    with torch.no_grad():
        for weight, index, values in rows:
            weight[index] = values.to(weight)
