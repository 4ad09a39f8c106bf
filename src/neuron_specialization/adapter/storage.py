"""Check adapter files before loading them, and write adapter directories atomically."""

import functools
import inspect
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import Trainer
from transformers.modelcard import extract_hyperparameters_from_trainer

from ..neurons.adapter_file import (
    CONFIG_NAME,
    KEY_PREFIX,
    MASK,
    PEFT_TYPE,
    PREFIX,
    check_holds_no_model,
    check_packed_rows,
    read_weights,
)
from ..neurons.card import describe_adapter, keep_card_of_hub
from ..neurons.card_sections import CardFacts
from ..neurons.files import atomic_directory
from ..neurons.masks import NeuronMasks
from .layer import NeuronSpecializationLayer

_WEIGHTS_FOLLOW = ContextVar("weights_follow", default=False)


@contextmanager
def weights_follow() -> Iterator[None]:
    """While an adapter is loaded: what is injected gets its masks from the weights that are read next."""
    token = _WEIGHTS_FOLLOW.set(True)
    try:
        yield
    finally:
        _WEIGHTS_FOLLOW.reset(token)


def take_stored_masks(config: Any) -> None:
    """Give a config that was read from an adapter, to make a new one like it, the masks of that adapter."""
    if config.masks is not None or _WEIGHTS_FOLLOW.get():
        return
    if config.weights_file is not None:
        config.masks = NeuronMasks.from_pretrained(config.weights_file.parent)
        config.weights_file = None
    elif config.weights_digest is not None:  # read by PEFT's own class, which does not say from where
        warnings.warn(
            "This config was read from an adapter, without its masks: until that adapter's weights are loaded, every "
            "pair keeps all neurons. For a new adapter with these masks, read it with "
            "NeuronSpecializationConfig.from_pretrained(...), or pass masks=... to a config of its own.",
            stacklevel=2,
        )


def save_adapter(model: PeftModel, directory: str | PathLike[str], *, overwrite: bool = False, **kwargs: Any) -> None:
    """Save a model's adapters as `save_pretrained` does, all files together.

    Args:
        model: model with adapters.
        directory: where to save; files of an earlier adapter of this method there are replaced, others stay.
        overwrite: also replace files of the same names that this package did not write.
        **kwargs: passed to `save_pretrained`. Of several processes only the main one writes: the others pass
            `is_main_process=False`.

    Raises:
        ValueError: if `directory` holds a model, or files of these names that this package did not write.
    """
    check_holds_no_model(directory)
    if not kwargs.get("is_main_process", True):
        model.save_pretrained(str(directory), **kwargs)  # which writes nothing
        return
    with atomic_directory(directory, overwrite) as fresh:
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
    extra = sorted(set(tensors) - set(expected) - _other_tensors(model, config))
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


def check_file(model: nn.Module, config: Any, adapter_name: str, path: Path) -> None:
    """Check a weights file against the adapter that was just injected for it; see `check_tensors`."""
    check_tensors(model, config, adapter_name, as_model_keys(model, adapter_name, read_weights(path)))


def described_upload(upload: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the upload of transformers' `push_to_hub`: an adapter of this method goes with a card of its own."""

    @functools.wraps(upload)
    def described(model: Any, working_dir: str | PathLike[str], repo_id: str, *args: Any, **kwargs: Any) -> Any:
        if _holds_adapter(working_dir):
            describe_adapter(working_dir, CardFacts(repo_id=repo_id))
        return upload(model, working_dir, repo_id, *args, **kwargs)

    return described


def described_saving(update: Callable[..., None]) -> Callable[..., None]:
    """Wrap `create_or_update_model_card` of PEFT's `PeftModel`: adapters of this method write cards of their own, into
    which PEFT would put its tags and the base's directory, over what the user edited there."""

    @functools.wraps(update)
    def described(model: PeftModel, output_dir: str) -> None:
        if any(config.peft_type != PEFT_TYPE for config in model.peft_config.values()):
            update(model, output_dir)

    return described


def described_training(create: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `create_model_card` of transformers' `Trainer`: an adapter of this method keeps a card of its own, with the
    license, the datasets (`dataset_tags`) and the settings that Trainer's would have."""

    @functools.wraps(create)
    def described(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        directory = str(trainer.args.output_dir)
        if not _holds_adapter(directory):
            return create(trainer, *args, **kwargs)
        if trainer.is_world_process_zero():
            given = inspect.signature(create).bind(trainer, *args, **kwargs).arguments
            tags = given.get("dataset_tags") or []
            facts = CardFacts(trainer.hub_model_id, given.get("license"), [tags] if isinstance(tags, str) else tags)
            facts.training = extract_hyperparameters_from_trainer(trainer)
            if trainer.hub_model_id is not None:
                with suppress(RepositoryNotFoundError):  # it is private, and the token was passed to the upload alone
                    keep_card_of_hub(HfApi(token=trainer.args.hub_token), trainer.hub_model_id, directory)
            describe_adapter(directory, facts)

    return described


def _holds_adapter(directory: str | PathLike[str]) -> bool:
    config = Path(directory) / CONFIG_NAME
    return config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("peft_type") == PEFT_TYPE


def as_model_keys(model: nn.Module, adapter_name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a file's tensors under the names they get in the model."""
    named = {key.removeprefix(KEY_PREFIX): tensor for key, tensor in tensors.items()}
    suffix = f".{adapter_name}"
    own = {key.removesuffix(suffix): key for key in model.state_dict() if PREFIX in key and key.endswith(suffix)}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            translated = module.adapter_state_dict_load_map(adapter_name).items()
            own |= {f"{name}.{stored}": f"{name}.{loaded}" for stored, loaded in translated}
    return {own.get(key, key): tensor for key, tensor in named.items()}


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
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            keys = (f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values())
            expected |= {key: (state[key].dtype, tuple(state[key].shape)) for key in keys if key in state}
    if config.trainable == "full":
        parameters = dict(model.named_parameters())
        for name in base_parameter_names(model):
            expected[name] = parameters[name].dtype, tuple(parameters[name].shape)
    return expected


def _other_tensors(model: nn.Module, config: Any) -> set[str]:
    """Return the keys of embeddings that PEFT saves along where the vocabulary was resized.

    The config lists them; where the file holds the whole base, they are among its parameters, under tied names too.
    """
    if config.trainable == "full":
        return {name for name, _ in model.named_parameters(remove_duplicate=False) if PREFIX not in name}
    listed = {key.removeprefix(KEY_PREFIX) for key in config.other_tensors or []}
    return {key for key in model.state_dict() if key.removeprefix(KEY_PREFIX) in listed}


def _shorten(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
