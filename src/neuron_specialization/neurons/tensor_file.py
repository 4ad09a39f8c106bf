"""Tensors and what describes them, in one safetensors file."""

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .files import replacing


def save_described(
    path: str | PathLike[str], tensors: Mapping[str, torch.Tensor], kind: str, about: Mapping[str, Any]
) -> None:
    """Write tensors, and `about` as JSON under the name `kind` in the header; the file is replaced whole."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        save_file(whole, partial, metadata={kind: json.dumps(about)})


def load_described(
    path: str | PathLike[str], kind: str, expected: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors, sorted by name as text, and what describes them.

    Args:
        path: a file that `save_described` wrote.
        kind: the name that it was written with.
        expected: what should stand there, for the error.

    Raises:
        ValueError: if the file is of another kind, or cannot be read.
    """
    wrong = f"{path} holds no {expected}."
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(kind)
            if about is None:
                raise ValueError(wrong)
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(about)
    except SafetensorError as error:
        raise ValueError(f"{wrong} It cannot be read: {error}") from error
