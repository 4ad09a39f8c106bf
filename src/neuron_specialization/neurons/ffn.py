"""Find the feed-forward (FFN) blocks of an encoder-decoder model by their structure.

A block is an `up` projection a→b, an activation, and a `down` projection b→a; gated blocks have a second a→b
projection whose output is activated and multiplied in (T5 v1.1, mT5, Gemma). No model class is named anywhere here.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .base_model import build_on_meta, is_encoder_decoder, unwrap

ENCODER, DECODER = "encoder", "decoder"
STACKS = (ENCODER, DECODER)
_GATE_NAMES = re.compile(r"gate|wi_0")


@dataclass(frozen=True, eq=False)
class FfnBlock:
    """One feed-forward block.

    Attributes:
        name: qualified module name of the masked projection: the gate of a gated block, else the up projection.
        stack: "encoder" or "decoder".
        layer: index of the Transformer layer inside its stack.
        up: projection from d_model to d_ff.
        gate: for gated blocks, the projection whose output goes through the activation.
        down: projection from d_ff to d_model; its input is the output of the neurons.
        activation: elementwise function between the projections.
        d_ff: number of neurons.
    """

    name: str
    stack: str
    layer: int
    up: nn.Module
    gate: nn.Module | None
    down: nn.Module
    activation: Callable[[torch.Tensor], torch.Tensor]
    d_ff: int


def find_ffn_blocks(model: nn.Module) -> list[FfnBlock]:
    """Return every FFN block of an encoder-decoder model, encoder first, in the order of the layers.

    Raises:
        ValueError: if the model is not an encoder-decoder, or no FFN block is found in it.
    """
    model = unwrap(model)
    if not is_encoder_decoder(model):
        raise ValueError(
            f"{type(model).__name__} is not an encoder-decoder model. Specialized neurons are defined for models with "
            "an encoder and a decoder (NLLB, M2M100, mBART, Marian, T5, ...): load one with AutoModelForSeq2SeqLM."
        )
    prefixes = _stack_prefixes(model)
    towers = tuple(f"{name}." for name, module in model.named_modules() if _sees_images(module))
    blocks = [
        FfnBlock(name, *_locate(name, prefixes), *parts)
        for parent_name, parent in model.named_modules()
        for name, *parts in _blocks_of(parent_name, parent)
        if not name.startswith(towers)
    ]
    if not blocks:
        raise ValueError(
            f"No FFN block found in {type(model).__name__}. Looked for sibling linear layers a→b and b→a with an "
            "activation beside them. Name the projections to mask with target_modules=[...] instead."
        )
    return sorted(blocks, key=lambda block: STACKS.index(block.stack))


def in_order(names: Iterable[str], stacks: Mapping[str, str]) -> list[str]:
    """Return block names in the order of `find_ffn_blocks`, by the layer numbers in them: JSON sorts them as text."""

    def place(name: str) -> tuple[int, list[int]]:
        return STACKS.index(stacks[name]), [int(number) for number in re.findall(r"\d+", name)]

    return sorted(names, key=place)


def fingerprint(model: nn.Module, blocks: list[FfnBlock]) -> dict[str, str | int]:
    """Describe the base model a mask was made for: model type, layers, width, activation.

    The number of neurons of each block is stored beside the masks themselves.
    """
    activation = blocks[0].activation
    up: Any = blocks[0].up
    return {
        "model_type": unwrap(model).config.model_type,
        "encoder_blocks": sum(block.stack == ENCODER for block in blocks),
        "decoder_blocks": sum(block.stack == DECODER for block in blocks),
        "d_model": up.in_features,
        "activation": getattr(activation, "__name__", type(activation).__name__),
    }


def sample_weights(blocks: list[FfnBlock]) -> list[float]:
    """Return a few weights of the base model, to recognize another checkpoint of the same architecture.

    They are read from down projections, before an adapter is loaded that may have trained them. Values, unlike a hash,
    survive a cast to another type (see `same_weights`). Empty where the weights are not plain (quantized, sharded,
    offloaded).
    """
    values: list[float] = []
    for block in (blocks[0], blocks[len(blocks) // 2], blocks[-1]):
        weight = getattr(block.down, "weight", None)
        if not isinstance(weight, torch.Tensor) or type(weight.data) is not torch.Tensor or weight.is_meta:
            return []
        flat = weight.detach().flatten()
        if not flat.is_floating_point() or not len(flat):
            return []
        # float32 may round the last place of a large matrix up, beyond its end
        places = torch.linspace(0, len(flat) - 1, 8).long().clamp(max=len(flat) - 1)
        values += flat[places.to(flat.device)].float().tolist()
    return values


def same_weights(a: list[float] | None, b: list[float] | None) -> bool:
    """Whether two samples of weights are of one checkpoint, up to a cast to bfloat16; also where one is missing."""
    if not a or not b:
        return True
    tolerance = 2**-8 * max(map(abs, [*a, *b]))
    return len(a) == len(b) and all(abs(x - y) <= tolerance for x, y in zip(a, b, strict=True))


def is_time_major(model: nn.Module) -> bool:
    """Whether the model's layers compute on [length, batch, d_model] instead of [batch, length, d_model] (FSMT).

    Looked up by running a copy without weights (on the meta device) on two sequences of three tokens.
    """
    model = unwrap(model)
    shapes: list[tuple[int, ...]] = []
    try:
        empty = build_on_meta(model)
        down = find_ffn_blocks(empty)[0].down
        down.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
        with torch.no_grad():
            empty.get_encoder()(torch.ones(2, 3, dtype=torch.int64, device="meta"))
    except Exception:
        # a forward that inspects values cannot run without them, and some inputs are not tokens: the shape may have
        # been seen by then, and else the model follows the library's convention
        pass
    return bool(shapes) and shapes[0][:2] == (3, 2)


def _sees_images(module: nn.Module) -> bool:
    """Whether a module is the image tower of a model whose text blocks are the ones that translate (T5Gemma 2)."""
    return getattr(module, "main_input_name", None) == "pixel_values"


def stack_of(model: nn.Module, name: str) -> str:
    """Return the stack that a module is in; one under neither encoder nor decoder counts as the decoder's."""
    return _locate(name, _stack_prefixes(model) if is_encoder_decoder(model) else {})[0]


def _stack_prefixes(model: nn.Module) -> dict[str, str]:
    names = {id(module): name for name, module in model.named_modules()}
    prefixes = {}
    for stack in STACKS:
        module = getattr(model, f"get_{stack}")()
        if id(module) in names:
            prefixes[stack] = names[id(module)] + "."
    return prefixes


def _locate(name: str, prefixes: dict[str, str]) -> tuple[str, int]:
    """Return (stack, layer). A block under neither the encoder nor the decoder counts as the decoder's."""
    stack = ENCODER if ENCODER in prefixes and name.startswith(prefixes[ENCODER]) else DECODER
    relative = name.removeprefix(prefixes.get(stack, ""))
    layer = re.search(r"\.(\d+)\.", f".{relative}")
    return stack, int(layer.group(1)) if layer else 0


def _blocks_of(parent_name: str, parent: nn.Module) -> Iterator[tuple]:
    """Yield (name, up, gate, down, activation, d_ff) for the block whose parts are children of `parent`, if any."""
    activation = _activation_of(parent)
    if activation is not None:
        yield from _match(parent_name, list(_linear_children(parent)), activation)
        return
    # BERT keeps the two halves in sibling modules: intermediate (dense, activation) and output (dense)
    children = list(parent.named_children())
    for i, (first_name, first) in enumerate(children):
        first_linears = list(_linear_children(first))
        activation = _activation_of(first)
        if activation is None or len(first_linears) != 1:
            continue
        for second_name, second in children[i + 1 :]:
            second_linears = list(_linear_children(second))
            if len(second_linears) == 1:
                up = (f"{first_name}.{first_linears[0][0]}", first_linears[0][1])
                down = (f"{second_name}.{second_linears[0][0]}", second_linears[0][1])
                yield from _match(parent_name, [up, down], activation)


def _match(
    parent_name: str, linears: list[tuple[str, nn.Module]], activation: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[tuple]:
    """Pair the last linear b→a with the one (plain) or two (gated) linears a→b defined before it."""
    for i in reversed(range(len(linears))):
        down: Any = linears[i][1]
        ups = [
            (name, module)
            for name, module in linears[:i]
            if (module.in_features, module.out_features) == (down.out_features, down.in_features)
        ]
        if len(ups) not in (1, 2):
            continue
        gates = [pair for pair in ups if _GATE_NAMES.search(pair[0])] if len(ups) == 2 else []
        if len(ups) == 2 and len(gates) != 1:
            continue
        name, masked = gates[0] if gates else ups[0]
        up = next(module for _, module in ups if module is not masked) if gates else masked
        qualified = f"{parent_name}.{name}" if parent_name else name
        yield qualified, up, (masked if gates else None), down, activation, down.in_features
        return


def _linear_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield linear children: torch's, quantized ones, and linears wrapped by PEFT all expose their two widths."""
    for name, child in module.named_children():
        if isinstance(getattr(child, "in_features", None), int) and isinstance(
            getattr(child, "out_features", None), int
        ):
            yield name, child


def _activation_of(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return the activation stored beside the projections: an attribute named act..., activation..., or ..._act_fn."""
    candidates = [*module.named_children(), *((k, v) for k, v in vars(module).items() if not k.startswith("_"))]
    for name, value in candidates:
        is_layer = isinstance(value, nn.Dropout) or isinstance(getattr(value, "in_features", None), int)
        if "act" in name and callable(value) and not is_layer:
            return value
    return None
