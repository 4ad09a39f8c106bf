"""The transformers model inside its wrappers, and properties of its architecture."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def unwrap(model: nn.Module) -> Any:
    """Return the transformers model inside compile, data-parallel and PEFT wrappers."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return unwrap(model.module)
    if not callable(getattr(model, "get_base_model", None)):
        return model
    wrapper: Any = model
    # PEFT asks the active adapter's config, which is gone with the last adapter
    return wrapper.get_base_model() if wrapper.peft_config else wrapper.base_model.model


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether `model` is declared as an encoder-decoder model."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def number_of_positions(model: nn.Module) -> int | None:
    """Return how many tokens a model has positions for; None for a model without such a limit."""
    return getattr(unwrap(model).config, "max_position_embeddings", None)


def fixed_positions(model: nn.Module) -> int | None:
    """Return the number of positions of a model that cannot make more; None where sinusoids (NLLB, M2M100, FSMT) can.

    Positions beyond `number_of_positions` have no training then, and still a loss.
    """
    makers = ("make_weights", "make_weight")
    grow = any(hasattr(module, name) for module in unwrap(model).modules() for name in makers)
    return None if grow else number_of_positions(model)


def device_of(module: nn.Module) -> torch.device:
    """Return the device that a module takes its inputs on.

    Where accelerate offloaded the weights, its hooks move the inputs from the CPU; modules that torch quantized
    dynamically have no parameters and run on the CPU.
    """
    weight = next(module.parameters(), None)
    return torch.device("cpu") if weight is None or weight.is_meta else weight.device


def moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors on a device; whatever else it holds stays as it is."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def build_on_meta(model: nn.Module) -> Any:
    """Return the model that a plain transformers model's config describes, without weights (on the meta device)."""
    with torch.device("meta"):
        return type(model)(model.config)


def make_trainable(model: Any) -> Any:
    """Make a model trainable in place, except for what its architecture itself freezes (sinusoidal positions)."""
    described = build_on_meta(model) if isinstance(model, PreTrainedModel) else nn.Module()
    frozen = {name for name, parameter in described.named_parameters() if not parameter.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return model
