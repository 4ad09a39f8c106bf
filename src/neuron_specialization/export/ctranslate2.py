"""Compact models for CTranslate2, converted from memory: it reads each layer's width, so nothing is filled up."""

from os import PathLike
from typing import Any

from ..neurons.adapter_file import atomic_directory

QUANTIZATIONS = ("float32", "float16", "bfloat16", "int16", "int8", "int8_float32", "int8_float16", "int8_bfloat16")


def save_ctranslate2(
    model: Any, tokenizer: Any, directory: str | PathLike[str], quantization: str | None = None
) -> None:
    """Convert a plain transformers model, such as `ns.compact` returns, into a CTranslate2 model directory.

    Args:
        model: the model; it may be ragged.
        tokenizer: its tokenizer, written beside the converted model.
        directory: where to write; replaced as a whole.
        quantization: one of QUANTIZATIONS, or None to keep the type of the weights.

    Raises:
        ValueError: if CTranslate2 cannot convert this architecture, or does not know the quantization.
        ImportError: if CTranslate2 is not installed (`pip install neuron-specialization[export]`).
    """
    loader = check_convertible(model, quantization)
    from ctranslate2.converters import Converter

    class FromMemory(Converter):
        """CTranslate2's own converter reads from the disk, where layers of one stack cannot differ in width."""

        def _load(self) -> Any:
            return loader(model, tokenizer)

    with atomic_directory(directory) as fresh:
        FromMemory().convert(str(fresh), quantization=quantization, force=True)
        tokenizer.save_pretrained(fresh)


def check_convertible(model: Any, quantization: str | None) -> Any:
    """Return CTranslate2's loader for a model's architecture; raises as `save_ctranslate2` does, before any work."""
    try:
        from ctranslate2.converters.transformers import _MODEL_LOADERS
    except ImportError as error:
        raise ImportError("CTranslate2 is missing: pip install 'neuron-specialization[export]'.") from error
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}.")
    loader = _MODEL_LOADERS.get(type(model.config).__name__)
    if loader is None:
        known = ", ".join(sorted(name.removesuffix("Config") for name in _MODEL_LOADERS))
        raise ValueError(f"CTranslate2 cannot convert a {type(model).__name__}; it converts: {known}.")
    return loader
