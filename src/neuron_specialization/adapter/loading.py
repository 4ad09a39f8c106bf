"""Load adapters with PEFT and with transformers: one that is refused leaves the model as it was.

Neither library has a hook for methods around the whole of loading, so their functions are wrapped. PEFT injects an
adapter before it reads the weights, and loads any weights that fit into an adapter that is already there, whatever
their config says. transformers loads the tensors that fit, and leaves a refused adapter injected.
"""

import functools
import json
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers.integrations.peft import PeftAdapterMixin

from ..neurons.adapter_file import CONFIG_NAME, PEFT_TYPE, read_weights, verify_digest
from ..neurons.base_model import unwrap
from ..neurons.files import complete_writing
from ..neurons.language_pairs import shorten
from .config import NeuronSpecializationConfig
from .rollback import rolled_back_on_error
from .storage import as_model_keys, check_tensors, weights_follow

_FIRST_WITH_PEFT: Any = vars(PeftModel)["from_pretrained"].__func__
_WITH_PEFT: Any = PeftModel.load_adapter
_WITH_TRANSFORMERS: Any = PeftAdapterMixin.load_adapter


def check_loaded_adapters() -> None:
    """Wrap the functions of both libraries that load adapters; doing so again changes nothing."""
    with_peft: Any = PeftModel
    with_transformers: Any = PeftAdapterMixin
    with_peft.from_pretrained = classmethod(_first_with_peft)
    with_peft.load_adapter = _with_peft
    with_transformers.load_adapter = _with_transformers


@functools.wraps(_FIRST_WITH_PEFT)
def _first_with_peft(cls: type, model: Any, model_id: str | PathLike[str], *args: Any, **kwargs: Any) -> Any:
    _complete(model_id, kwargs)
    with rolled_back_on_error(model), weights_follow():
        return _FIRST_WITH_PEFT(cls, model, model_id, *args, **kwargs)


@functools.wraps(_WITH_PEFT)
def _with_peft(model: Any, model_id: str | PathLike[str], adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    _complete(model_id, kwargs)
    present = model.peft_config.get(adapter_name)
    if isinstance(present, NeuronSpecializationConfig):
        _check_replaces(present, model_id, adapter_name, kwargs)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    with rolled_back_on_error(model), weights_follow():
        result = _WITH_PEFT(model, model_id, adapter_name, *args, **kwargs)
    loaded = model.peft_config[adapter_name]
    if isinstance(loaded, NeuronSpecializationConfig):
        loaded.read_from = None
        if loaded.trainable == "full" and kwargs.get("low_cpu_mem_usage"):
            _settle_assigned(model, dtypes)
    return result


def _settle_assigned(model: Any, dtypes: dict[str, torch.dtype]) -> None:
    """Tie again what was tied, in the model's dtypes: parameters were replaced by the file's, one by one."""
    unwrap(model).tie_weights()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))


@functools.wraps(_WITH_TRANSFORMERS)
def _with_transformers(model: Any, *args: Any, **kwargs: Any) -> Any:
    _complete(args[0] if args else kwargs.get("peft_model_id"), kwargs)
    with rolled_back_on_error(model), weights_follow():
        model._load_pretrained_model = _CheckedLoad(model)
        try:
            return _WITH_TRANSFORMERS(model, *args, **kwargs)
        except json.JSONDecodeError as error:
            raise ValueError(f"The adapter's {CONFIG_NAME} is damaged: it is no JSON ({error}).") from error
        finally:
            vars(model).pop("_load_pretrained_model", None)


def _complete(location: Any, kwargs: dict[str, Any]) -> None:
    """Complete what an interrupted save left; both libraries look for the config before we are asked to read it."""
    if isinstance(location, str | PathLike):
        with suppress(OSError):  # of a read-only directory; loading reports what is missing
            complete_writing(Path(location, kwargs.get("subfolder") or ""))


def _check_replaces(
    present: NeuronSpecializationConfig, location: str | PathLike[str], name: str, kwargs: dict[str, Any]
) -> None:
    """Check that stored weights may replace those of an adapter that is there: PEFT does not read their config.

    Raises:
        ValueError: if they are damaged, or of other language pairs.
    """
    if present.read_from == str(location):  # PEFT has just read it, to inject the adapter
        return
    download, _ = PeftModel._split_kwargs(kwargs)
    stored = NeuronSpecializationConfig.from_pretrained(str(location), **download)
    if not isinstance(stored, NeuronSpecializationConfig):
        return  # the tensors of another method do not fit
    settings = ("mask_bias", "update_only")
    differ = [name for name in settings if getattr(stored, name) != getattr(present, name)]
    if differ or stored.build_routes() != present.build_routes():
        of = [
            ", ".join([shorten(each.build_routes().language_pairs), *(f"{s}={getattr(each, s)}" for s in settings)])
            for each in (stored, present)
        ]
        raise ValueError(
            f"The weights in {location} are of {of[0]}, and cannot replace those of {name!r}, of {of[1]}. Load them "
            "under another name, or delete_adapter() first."
        )


class _CheckedLoad:
    """Replaces a model's `_load_pretrained_model` while transformers loads an adapter, and checks the adapter first.

    transformers injects an adapter and then loads the tensors that fit, without a hook for the adapter's method.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.before = set(getattr(model, "peft_config", {}))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        vars(model).pop("_load_pretrained_model", None)
        new = {name: config for name, config in model.peft_config.items() if name not in self.before}
        ours = {name: config for name, config in new.items() if config.peft_type == PEFT_TYPE}
        for name, config in ours.items():
            tensors = _tensors_to_load(config, **kwargs)
            check_tensors(model, config, name, as_model_keys(model, name, tensors))
        loaded = model._load_pretrained_model(*args, **kwargs)
        if any(config.trainable == "full" for config in ours.values()):
            model.tie_weights()  # loading replaced one of the tied parameters
        return loaded


def _tensors_to_load(
    config: Any, state_dict: Any = None, checkpoint_files: Any = None, **kwargs: Any
) -> dict[str, torch.Tensor]:
    """Return what `_load_pretrained_model` was asked to load, after checking a file's digest."""
    if state_dict is not None:
        return state_dict
    path = Path(checkpoint_files[0])
    verify_digest(config.weights_digest, path, path.parent)
    config.weights_digest = None
    return read_weights(path)
