"""What training changes in the singular values of a model's weight matrices, by type of matrix."""

import re
from typing import Any

from torch import nn

from ..neurons.base_model import unwrap
from ..neurons.ffn import find_ffn_blocks
from .spectrum import singular_values, spectrum_statistics

STATISTICS = ("mean", "frobenius", "normalized_sum", "spectral", "effective_rank", "stable_rank")
_ATTENTION = {"q": "q|q_proj|query", "k": "k|k_proj|key", "v": "v|v_proj|value", "o": "o|o_proj|out_proj"}
_CROSS = re.compile(r"encoder_attn|EncDecAttention|cross_?attn|cross_?attention", re.IGNORECASE)


def matrix_types(model: nn.Module) -> dict[str, str]:
    """Return parameter name → type of every matrix that `singular_values` looks at.

    Types are "encoder q" (k, v, o: attention; up, gate, down: FFN), the same of "decoder" and, for attention to the
    encoder, of "cross"; "embedding" of tokens, "output", and "other".
    """
    base = unwrap(model)
    roles: dict[nn.Module, str] = {}
    for block in find_ffn_blocks(base):
        roles |= {block.up: "up", block.down: "down"}
        roles |= {block.gate: "gate"} if block.gate is not None else {}
    embedding, output = base.get_input_embeddings().weight, base.get_output_embeddings()
    sides = {name: {id(p) for p in getattr(base, f"get_{name}")().parameters()} for name in ("encoder", "decoder")}
    found = {}
    for name, module in base.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        leaf = name.rpartition(".")[2]
        role = roles.get(module) or next((r for r, names in _ATTENTION.items() if re.fullmatch(names, leaf)), None)
        if role is not None:
            side = "encoder" if id(module.weight) in sides["encoder"] else "decoder"
            found[f"{name}.weight"] = f"{'cross' if _CROSS.search(name) else side} {role}"
        else:
            of_tokens = "embedding" if module.weight is embedding else "other"
            found[f"{name}.weight"] = "output" if module is output else of_tokens
    return found


def spectra(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return parameter name → "type" of the matrix, its "shape" and the statistics of its singular values.

    Norm gains are folded in (see `singular_values`); the statistics are those of `spectrum_statistics`.

    Args:
        model: a seq2seq model without adapters.
    """
    types, base = matrix_types(model), unwrap(model)
    return {
        name: {"type": types[name], "shape": list(base.get_parameter(name).shape), **spectrum_statistics(sigma)}
        for name, sigma in singular_values(base).items()
    }


def spectrum_changes(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per matrix: its type, its statistics after training, and their ratios to those before.

    Args:
        before: what `spectra` returns of the model that training started from.
        after: of the trained model.

    Raises:
        ValueError: if the matrices of the two differ in name or shape.
    """
    shapes = [{name: values["shape"] for name, values in each.items()} for each in (before, after)]
    if shapes[0] != shapes[1]:
        odd = min(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(
            f"Expected the same matrices, to compare singular values, but {odd} is {shapes[0].get(odd)} in one "
            f"and {shapes[1].get(odd)} in the other. Compare a model with the one that its training started from."
        )
    return [
        {"matrix": name, **values, "ratio": {each: values[each] / before[name][each] for each in STATISTICS}}
        for name, values in after.items()
    ]
