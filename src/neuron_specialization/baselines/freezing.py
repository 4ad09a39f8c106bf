"""Freeze parts of an encoder-decoder model by name, as sequential transfer does at each of its steps."""

from typing import Any

from torch import nn

from ..neurons.ffn import DECODER, ENCODER, STACKS

EMBEDDINGS, NONE = "embeddings", "none"


def frozen_parameters(model: Any, names: str) -> list[nn.Parameter]:
    """Return the parameters to freeze; nothing is changed.

    - "encoder", "decoder": the parameters of that stack that no other part of the model uses. An embedding that the
      stacks share is frozen by "embeddings" only.
    - "embeddings": every input embedding, and the output projection with its bias.
    - "none": nothing.
    - anything else: a module or parameter by its qualified name, such as "model.decoder.layers.0".

    Args:
        model: a seq2seq model; inside adapters, whose wrappers of its layers count for nothing in names.
        names: one of these, or several joined by "+".

    Raises:
        ValueError: if a name matches nothing, or nothing would be left to train.
    """
    frozen: dict[int, nn.Parameter] = {}
    for name in names.split("+"):
        found = _named(model, name)
        if not found and name != NONE:
            raise ValueError(
                f"freeze: nothing in this model is called {name!r}. Expected encoder, decoder, embeddings, none, or "
                "the qualified name of a module or parameter, such as model.encoder.layers.0; several are joined by +."
            )
        frozen |= {id(parameter): parameter for parameter in found}
    if not [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in frozen]:
        raise ValueError(f"freeze: with {names!r} frozen, nothing is left to train.")
    return list(frozen.values())


def _named(model: Any, name: str) -> list[nn.Parameter]:
    if name in STACKS:
        stacks = {stack: getattr(model, f"get_{stack}")() for stack in STACKS}
        inside = stacks[name].parameters()
        other = stacks[ENCODER if name == DECODER else DECODER].parameters()
        elsewhere = {id(parameter) for parameter in [*other, *_embeddings(model, outside=stacks[name])]}
        return [parameter for parameter in inside if id(parameter) not in elsewhere]
    if name == EMBEDDINGS:
        return _embeddings(model)
    named = {key.replace(".base_layer", ""): parameter for key, parameter in model.named_parameters()}
    found = [parameter for key, parameter in named.items() if key == name or key.startswith(f"{name}.")]
    return found if name else []


def _embeddings(model: Any, outside: nn.Module | None = None) -> list[nn.Parameter]:
    """Return the parameters of input and output embeddings; not those of input embeddings inside a module."""
    stacks = [getattr(model, f"get_{stack}")() for stack in STACKS]
    owners = [model, *(stack for stack in stacks if stack is not outside)]
    modules = [owner.get_input_embeddings() for owner in owners] + [model.get_output_embeddings()]
    return list({id(p): p for module in modules if module is not None for p in module.parameters()}.values())
