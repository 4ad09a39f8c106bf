"""Do language pairs pull the same weights in different directions? Cosines of their gradients, block by block.

g_p(B) = (1 / N_p) Σ_t ∇_B (cross-entropy of token t), over the N_p target tokens of pair p, in eval mode, with B the
weights of one block. The cosine of g_p and g_q is negative where a step that helps one pair hurts the other (Yu et
al., 2020; Wang et al., 2021).

A gradient of a sample is noisy, which pulls cosines towards 0, and pairs that share sentences share their noise. So
the text is cut into two halves, and a pair's gradient on the one is compared with every pair's on the other:
cos(p, q) = ½ [cos(g_p¹, g_q²) + cos(g_p², g_q¹)]. The diagonal, a pair with itself, is about the largest cosine that
so much text allows, and the others are read against it.

Memory: one gradient of the blocks' weights per pair and half, in float32 on the CPU.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..neurons.base_model import device_of, moved, unwrap
from ..neurons.ffn import FfnBlock, find_ffn_blocks
from ..neurons.language_pairs import split_pair

SCOPES = ("up", "block")
RELATIONS = ("itself", "same source", "same target", "reverse", "other")

Gradients = dict[str, torch.Tensor]


def pair_gradients(
    model: nn.Module, batches: Mapping[str, Iterable[Mapping[str, Any]]], scope: str = "up"
) -> Gradients:
    """Return each pair's gradient of every FFN block: block name → float32 [pairs, parameters].

    A model with an adapter of ours runs under its masks where a batch says its `language_pairs`; the weights looked
    at are those of the base, so the gradient of a masked row is 0.

    Args:
        model: a seq2seq model with plain float weights, on its device. Which parameters require a gradient and
            whether it trains is as before when this returns.
        batches: pair → batches as the model's forward takes them, with labels; -100 does not count.
        scope: "up" for the weight that masks act on (the gate's where there is one), or "block" for all weights and
            biases of the FFN block.

    Raises:
        ValueError: if the scope is unknown, or a pair has no target token.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}.")
    weights = {block.name: _weights(block, scope) for block in find_ffn_blocks(unwrap(model))}
    device = device_of(model)
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in weights}
    with _differentiated(model, [weight for each in weights.values() for weight in each]):
        for pair, group in batches.items():
            tokens = 0
            for batch in group:
                here = moved(batch, device)
                labels = here["labels"]  # from which some models make the decoder's input
                logits = model(**here)["logits"].float()
                F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
                tokens += int(labels.ne(-100).sum())
            if not tokens:
                raise ValueError(f"{pair} has no target token to compute a gradient of.")
            for name, each in weights.items():
                flat = [torch.zeros_like(w) if w.grad is None else w.grad for w in each]
                rows[name].append(torch.cat([gradient.flatten().float() for gradient in flat]).cpu() / tokens)
                for weight in each:
                    weight.grad = None
    return {name: torch.stack(each) for name, each in rows.items()}


def gradient_cosines(first: Gradients, second: Gradients) -> dict[str, np.ndarray]:
    """Return block name → float64 [pairs, pairs], symmetric: cosines across two halves of the text (see above).

    Args:
        first: `pair_gradients` of one half.
        second: of the other half, for the same pairs.
    """
    cosines = {}
    for name, rows in first.items():
        a, b = (F.normalize(half.double(), dim=1) for half in (rows, second[name]))
        across = (a @ b.T).numpy()
        cosines[name] = (across + across.T) / 2
    return cosines


def relation(a: str, b: str) -> str:
    """Return what two directions have in common, one of RELATIONS."""
    (source, target), (other_source, other_target) = split_pair(a), split_pair(b)
    if a == b:
        return "itself"
    if source == other_source:
        return "same source"
    if target == other_target:
        return "same target"
    return "reverse" if (source, target) == (other_target, other_source) else "other"


def gradient_rows(
    cosines: Mapping[str, np.ndarray], language_pairs: list[str], model: nn.Module
) -> list[dict[str, Any]]:
    """Return one row per block: the mean cosine over pairs of directions of each relation, and the share below 0.

    Args:
        cosines: what `gradient_cosines` returns.
        language_pairs: the pairs, in the order of the gradients.
        model: the model, for the place of its blocks.
    """
    kinds = np.array([[relation(a, b) for b in language_pairs] for a in language_pairs])
    different = kinds != "itself"
    rows = []
    for block in find_ffn_blocks(unwrap(model)):
        values = cosines[block.name]
        means = {kind: float(values[kinds == kind].mean()) for kind in RELATIONS if (kinds == kind).any()}
        below = float((values[different] < 0).mean()) if different.any() else None
        rows.append({"stack": block.stack, "layer": block.layer, "block": block.name, **means, "below 0": below})
    return rows


def _weights(block: FfnBlock, scope: str) -> list[torch.Tensor]:
    """Return the weights looked at; a wrapped projection's `weight` is that of its base layer."""
    masked: Any = block.gate if block.gate is not None else block.up
    if scope == "up":
        return [masked.weight]
    projections: list[Any] = [block.up, block.gate, block.down]
    both = [(p.weight, p.bias) for p in projections if p is not None]
    return [tensor for pair in both for tensor in pair if tensor is not None]


@contextmanager
def _differentiated(model: nn.Module, wanted: list[torch.Tensor]) -> Iterator[None]:
    """Within the context, the model is in eval mode and only the tensors wanted get a gradient."""
    modules = [module for module in model.modules() if module.training]
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    model.eval()
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for tensor in wanted:
            tensor.requires_grad_(True)
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        for module in modules:
            module.training = True
