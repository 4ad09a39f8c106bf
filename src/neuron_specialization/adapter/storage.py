"""Check adapter files before loading them, and write adapter directories atomically."""

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..neurons.adapter_file import (
    KEY_PREFIX,
    MASK,
    PREFIX,
    check_packed_rows,
    read_weights,
    verify_digest,
)
from ..neurons.files import atomic_directory
from .attachment import attach, detach
from .layer import NeuronSpecializationLayer


def save_adapter(model: PeftModel, directory: str | PathLike[str], **kwargs: Any) -> None:
    """Save a model's adapters as `save_pretrained` does, replacing the whole directory at the end.

    An existing `directory` is replaced; if saving fails, it is left unchanged.
    """
    with atomic_directory(directory) as fresh:
        model.save_pretrained(str(fresh), **kwargs)


def base_parameter_names(model: nn.Module) -> list[str]:
    """Return the names of all parameters except the adapters' own, tied ones once."""
    return [name for name, _ in model.named_parameters() if PREFIX not in name]


def check_tensors(model: nn.Module, config: Any, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
    """Check the tensors of a file, under the names they have in `model`, before any is copied.

    Args:
        model: model that the adapter was injected into.
        config: the adapter's config.
        adapter_name: its name in the model.
        tensors: what is about to be loaded.

    Raises:
        ValueError: if keys are missing or left over, or a dtype, shape, padding bit or mask row is wrong.
    """
    expected = _expected(model, config, adapter_name)
    missing = sorted(set(expected) - set(tensors))
    extra = sorted(set(tensors) - set(expected) - _allowed(model, tensors))
    if missing or extra:
        raise ValueError(
            "The adapter's file does not fit its config: "
            + "; ".join(
                f"{what} {_shorten(keys)}" for what, keys in (("missing", missing), ("unknown", extra)) if keys
            )
            + ". Nothing was loaded."
        )
    for key, (dtype, shape) in expected.items():
        tensor = tensors[key]
        if f".{MASK}." in key:
            check_packed_rows(key, tensor, shape[0], shape[1])
        elif tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(f"{key}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}.")


class CheckedLoad:
    """Stands in for a transformers model's `_load_pretrained_model`, once: checks an adapter's file before loading it.

    transformers' `load_adapter` offers no hook of its own, and loads whatever fits. It has injected the adapter by the
    time this is called; where the file is refused, the adapter is taken out again.
    """

    def __init__(self, model: Any, adapter_name: str) -> None:
        self.model = model
        self.adapter_name = adapter_name

    def install(self) -> None:
        """Put this in front of the model's own method."""
        self.model._load_pretrained_model = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        vars(model).pop("_load_pretrained_model", None)
        config = model.peft_config.get(self.adapter_name)
        try:
            tensors = self._tensors(config, **kwargs)
            if config is not None and any(PREFIX in key for key in tensors or [PREFIX]):
                check_tensors(model, config, self.adapter_name, self._as_model_keys(tensors))
        except Exception:
            remove_injected(model, self.adapter_name)
            raise
        loaded = model._load_pretrained_model(*args, **kwargs)
        if config is not None and config.trainable == "full":
            model.tie_weights()  # loading replaced one of the tied parameters
        return loaded

    def _tensors(
        self, config: Any, state_dict: Any = None, checkpoint_files: Any = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        if state_dict is not None:
            return state_dict
        path = Path(checkpoint_files[0])
        if config is not None and config.weights_digest is not None:
            verify_digest(config.weights_digest, path.parent)
            config.weights_digest = None
        return read_weights(path)

    def _as_model_keys(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors under the names they get in the model."""
        named = {key.removeprefix(KEY_PREFIX): tensor for key, tensor in tensors.items()}
        own = {key.rsplit(".", 1)[0]: key for key in self.model.state_dict() if PREFIX in key}
        for name, module in self.model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                translated = module.adapter_state_dict_load_map(self.adapter_name).items()
                own |= {f"{name}.{stored}": f"{name}.{loaded}" for stored, loaded in translated}
        return {own.get(key, key): tensor for key, tensor in named.items()}


def remove_injected(model: Any, adapter_name: str) -> None:
    """Take an adapter out of a model that transformers injected it into, layers and routes too."""
    router = attach(model)
    router.resolvers.pop(adapter_name, None)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, NeuronSpecializationLayer):
            if layer._all_available_adapter_names() == [adapter_name]:
                layer.release()
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.base_layer)
            elif adapter_name in layer.mask_bias:
                layer.delete_adapter(adapter_name)
    model.peft_config.pop(adapter_name, None)
    if not router.resolvers:
        detach(model)
    if not model.peft_config:
        del model.peft_config
        model._hf_peft_config_loaded = False


def _expected(model: nn.Module, config: Any, adapter_name: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return model key → (dtype, shape); of masks the shape is (rows, d_ff)."""
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, NeuronSpecializationLayer) or adapter_name not in layer.mask_bias:
            continue
        prefix = f"{name}." if name else ""
        packed = layer.neuron_specialization_mask[adapter_name]
        expected[f"{prefix}{MASK}.{adapter_name}"] = packed.dtype, (len(packed), layer.out_features)
        for attribute in layer.adapter_layer_names:
            if adapter_name in getattr(layer, attribute):
                parameter = getattr(layer, attribute)[adapter_name]
                expected[f"{prefix}{attribute}.{adapter_name}"] = parameter.dtype, tuple(parameter.shape)
    if config.trainable == "full":
        parameters = dict(model.named_parameters())
        for name in base_parameter_names(model):
            expected[name] = parameters[name].dtype, tuple(parameters[name].shape)
    return expected


def _allowed(model: nn.Module, tensors: dict[str, torch.Tensor]) -> set[str]:
    """Return the keys that PEFT itself adds: modules_to_save, trained tokens, resized embeddings."""
    prefixes = [f"{name}." for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    for get in ("get_input_embeddings", "get_output_embeddings"):
        embedding = getattr(model, get)() if hasattr(model, get) else None
        prefixes += [f"{name}." for name, m in model.named_modules() if embedding is not None and m is embedding]
    return {key for key in set(tensors) & set(model.state_dict()) if key.startswith(tuple(prefixes))}


def _shorten(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
