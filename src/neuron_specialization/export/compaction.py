"""One language pair as a smaller plain model: masked neurons are removed, and its outputs stay the same."""

import copy
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..adapter.attachment import detach
from ..adapter.compact_policy import single_row, why_not_compact
from ..adapter.layer import NeuronSpecializationLayer
from ..adapter.routing import router_of
from ..neurons.adapter_file import CONFIG_NAME
from ..neurons.base_model import build_on_meta, make_trainable, unwrap
from ..neurons.ffn import STACKS, find_ffn_blocks
from ..neurons.files import atomic_directory


def compact(model: nn.Module, pair: str) -> Any:
    """Return a copy of `model` for one pair: a plain transformers model whose FFNs hold only the pair's neurons.

    Each layer is as narrow as its mask, so layers differ in width. `save_compact` writes it as a checkpoint.

    Args:
        model: a model with one active neuron specialization adapter and no other; it is left as it is.
        pair: the language pair to keep.

    Raises:
        ValueError: if the pair is unknown (the default pair is not used), or the model has other adapters or an FFN
            that cannot be made compact.
    """
    router = router_of(model)
    for adapter in _active_adapters(unwrap(model)):
        router.resolvers[adapter].routes.route(pair)  # unlike a call, this does not fall back to a default pair
    base = copy.deepcopy(unwrap(model))
    router_of(base).select(pair)
    base.eval()
    layers = {name: m for name, m in base.named_modules() if isinstance(m, NeuronSpecializationLayer)}
    with torch.no_grad():
        for name, layer in layers.items():
            _cut(base, name, layer)
        for name, module in list(base.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                parent, _, child = name.rpartition(".")
                trained = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
                setattr(base.get_submodule(parent), child, trained)
    detach(base)
    for attribute in ("peft_config", "_hf_peft_config_loaded", "_load_pretrained_model"):
        vars(base).pop(attribute, None)
    left = sorted({type(module).__name__ for module in base.modules() if hasattr(module, "base_layer")})
    if left:
        raise ValueError(
            f"The model has other adapter layers ({', '.join(left)}) besides its masks; merge or unload them first."
        )
    return make_trainable(base)


def save_compact(model: Any, directory: str | PathLike[str], tokenizer: Any = None, overwrite: bool = False) -> Any:
    """Write a compact model as a checkpoint that transformers loads without this package, and return that model.

    transformers knows one width per stack, so narrower layers are padded with neurons that always output 0.

    Args:
        model: what `compact` returned; it is left as it is.
        directory: where to write; see `neurons.files.atomic_directory`.
        tokenizer: written beside it.
        overwrite: also replace files of the same names that this package did not write.

    Raises:
        ValueError: if the model's config has no FFN width that could be set, or `directory` holds an adapter:
            transformers would load it onto the checkpoint.
    """
    if Path(directory, CONFIG_NAME).is_file():
        raise ValueError(f"{directory} holds an adapter; choose another directory for the checkpoint.")
    padded = pad_stacks(copy.deepcopy(model))
    with atomic_directory(directory, overwrite) as fresh:
        padded.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
    return padded


def pad_stacks(model: Any) -> Any:
    """Give all layers of a stack the width of its widest one, in place, and set it in the config."""
    blocks = find_ffn_blocks(model)
    widths = {stack: max(block.d_ff for block in blocks if block.stack == stack) for stack in STACKS}
    _set_widths(model.config, widths)
    widths = _widths_of(model, {block.name: block.d_ff for block in blocks})
    with torch.no_grad():
        for block in blocks:
            extra = widths[block.name] - block.d_ff
            for part in (block.up, block.gate):
                if part is not None:
                    _grow(part, rows=extra)
            _grow(block.down, columns=extra)
    return model


def _active_adapters(base: nn.Module) -> list[str]:
    layers = (m for m in base.modules() if isinstance(m, NeuronSpecializationLayer))
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters if name in layer.mask_bias))


def _cut(base: nn.Module, name: str, layer: Any) -> None:
    """Replace a masked layer, and its block's other projections, by plain linears."""
    parent, _, child = name.rpartition(".")
    owner = base.get_submodule(parent)
    if layer.merged or layer.disable_adapters:
        raise ValueError("The adapter is merged or disabled; unmerge it (unmerge_adapter) or enable it first.")
    block = layer.compact_block
    row = single_row(layer, layer.call())
    if block is None or row is None:
        why = "it is no FFN block" if block is None else "several adapters are active"
    else:
        found = why_not_compact(block)
        why = "" if found is None else found.reason
    if row is None or why:
        raise ValueError(f"{name} cannot be cut to one pair: {why}. Merge the pair instead (merge_and_unload).")
    weights = block.kept(*row)
    block.release()
    setattr(owner, child, _linear(*weights.up()))
    for owner, place, part in block.places:
        setattr(owner, place, _linear(*(weights.down() if part is block.down else weights.other())))


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


def _grow(linear: Any, rows: int = 0, columns: int = 0) -> None:
    linear.weight = nn.Parameter(nn.functional.pad(linear.weight, (0, columns, 0, rows)))
    if linear.bias is not None and rows:
        linear.bias = nn.Parameter(nn.functional.pad(linear.bias, (0, rows)))
    linear.out_features, linear.in_features = linear.weight.shape


def _set_widths(config: Any, widths: dict[str, int]) -> None:
    """Set each stack's FFN width where the architecture keeps it."""
    for stack, width in widths.items():
        own = getattr(config, stack, None)
        if hasattr(config, f"{stack}_ffn_dim"):
            setattr(config, f"{stack}_ffn_dim", width)
        elif own is not None and hasattr(own, "intermediate_size"):
            own.intermediate_size = width
        elif hasattr(config, "d_ff"):
            config.d_ff = max(widths.values())
        else:
            raise ValueError(
                f"{type(config).__name__} has no FFN width that could be set for the {stack} (looked for "
                f"{stack}_ffn_dim, {stack}.intermediate_size, d_ff). Use the compact model in memory."
            )


def _widths_of(model: Any, least: dict[str, int]) -> dict[str, int]:
    """Return the width of each block in the model that the config now describes, built without weights."""
    described = build_on_meta(model)
    widths = {block.name: block.d_ff for block in find_ffn_blocks(described)}
    if widths.keys() != least.keys() or any(widths[name] < least[name] for name in least):
        raise ValueError("The model that the config describes has other FFN blocks; use the compact model in memory.")
    return widths
