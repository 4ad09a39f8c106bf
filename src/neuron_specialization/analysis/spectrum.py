"""Singular values of a model's weight matrices, comparable across models and norms.

A norm's gain scales the columns of the matrix that reads its output, and training can shift scale between the two
without changing what the model computes. Gains are therefore first folded into the matrices that read them.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..neurons.base_model import device_of, unwrap

_PROBE = 3  # tokens of the sequence that shows which matrix reads which norm
_SMALLEST_GAIN = 1e-9  # of the largest


def singular_values(model: nn.Module, fold_norms: bool = True) -> dict[str, torch.Tensor]:
    """Return the singular values of every linear layer and embedding, largest first.

    Args:
        model: a seq2seq model; adapters are ignored, so merge or unload them first.
        fold_norms: multiply the gain of a norm into the matrices that read its output directly.

    Returns:
        parameter name → float64 [min(rows, columns)]; matrices that share one parameter appear once, but for an output
        layer that shares that of the embedding and reads a norm, whose gain only it has.

    Raises:
        ValueError: if the model has no weight matrix.
    """
    base = unwrap(model)
    gains = _gains(base) if fold_norms else {}
    matrices = *_matrices(base, gains), *_tied_output(base, gains)
    values = {name: torch.linalg.svdvals(weight * gain) for name, weight, gain in matrices}
    if not values:
        raise ValueError(f"{type(base).__name__} has no linear layer or embedding to take singular values of.")
    return values


def with_spectrum_of(model: nn.Module, source: nn.Module) -> Any:
    """Return a copy of `model` with the singular values of `source` under its own singular vectors.

    Of every matrix W of a linear layer or embedding, with the gain g of the norm that it reads folded in,
    W diag(g) = U diag(σ) Vᵀ becomes U diag(σ of the source) Vᵀ, and g is divided out again. Norms and biases stay, so
    that a tied output layer keeps the gain of the norm that it reads.

    Args:
        model: a seq2seq model without adapters.
        source: another of the same shapes, such as the checkpoint that the training of `model` started from.

    Raises:
        ValueError: if the matrices of the two differ in name or shape, `model` has adapters, or a gain is zero.
    """
    if getattr(unwrap(model), "peft_config", None) or unwrap(model) is not model:
        raise ValueError("Expected a model without adapters: merge or unload them first.")
    copied = copy.deepcopy(model)
    spectra = singular_values(source)
    shapes = {name: weight.shape for name, weight, _ in _matrices(unwrap(source), {})}
    matrices = list(_matrices(copied, _gains(copied)))
    if {name: weight.shape for name, weight, _ in matrices} != shapes:
        raise ValueError(
            "Expected two models whose matrices have the same names and shapes, such as one before and after training."
        )
    for name, weight, gain in matrices:
        if bool((gain.abs() <= _SMALLEST_GAIN * gain.abs().max()).any()):
            raise ValueError(f"The norm that {name} reads has a gain of zero, which cannot be divided out.")
        u, _, v = torch.linalg.svd(weight * gain, full_matrices=False)
        with torch.no_grad():
            copied.get_parameter(name).copy_((u * spectra[name].to(u.device)) @ v / gain)
    return copied


_Gains = Mapping[nn.Module, torch.Tensor]  # what `_gains` returns


def _matrices(base: Any, gains: _Gains) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield parameter name, matrix, and the gain of the norm that it reads ([columns], or one) in float64."""
    modules = {f"{name}.weight": module for name, module in base.named_modules()}
    for name, parameter in base.named_parameters():
        if isinstance(modules.get(name), nn.Linear | nn.Embedding):
            gain = gains.get(modules[name], parameter.new_ones(1))
            yield name, parameter.detach().double(), gain.double()


def _tied_output(base: Any, gains: _Gains) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield the output layer as `_matrices` does, if its weight is that of the embedding and it reads a norm."""
    output: Any = base.get_output_embeddings() if gains else None
    if output in gains and output.weight is base.get_input_embeddings().weight:
        name = next(name for name, module in base.named_modules() if module is output)
        yield f"{name}.weight", output.weight.detach().double(), gains[output].double()


def spectrum_statistics(sigma: torch.Tensor) -> dict[str, float]:
    """Return statistics of a spectrum, given as singular values [r] of a matrix W.

    Returns:
        "frobenius" ‖W‖_F; "spectral" σ₁; "mean" of σ; "normalized_sum" Σσ / ‖W‖_F; "effective_rank", the exponential
        of the entropy of σ² / Σσ² (Roy & Vetterli, 2007, on energies); "stable_rank" ‖W‖_F² / σ₁².

    Raises:
        ValueError: if there is no value, one is negative, or all are zero.
    """
    sigma = sigma.double()
    if sigma.ndim != 1 or not len(sigma) or bool((sigma < 0).any()) or not bool((sigma > 0).any()):
        raise ValueError(f"Expected singular values, at least one above zero and none below, got {sigma}.")
    energy = sigma.square()
    shares = energy / energy.sum()
    return {
        "frobenius": energy.sum().sqrt().item(),
        "spectral": sigma.max().item(),
        "mean": sigma.mean().item(),
        "normalized_sum": (sigma.sum() / energy.sum().sqrt()).item(),
        "effective_rank": torch.special.entr(shares).sum().exp().item(),
        "stable_rank": (energy.sum() / energy.max()).item(),
    }


def _gains(base: Any) -> dict[nn.Module, torch.Tensor]:
    """Return linear layer → gain [d] of the norm whose output it reads.

    Found by running a few tokens: a layer reads a norm where its input is the same tensor object that the norm
    returned.
    """
    outputs: dict[int, tuple[torch.Tensor, nn.Module]] = {}
    found: dict[nn.Module, nn.Module] = {}

    def remember(norm: nn.Module, args: tuple, output: torch.Tensor) -> None:
        outputs[id(output)] = output, norm  # while the tensor lives, no other gets its id

    def look_up(linear: nn.Module, args: tuple) -> None:
        if args and id(args[0]) in outputs:
            found[linear] = outputs[id(args[0])][1]

    norms = [m for m in base.modules() if "Norm" in type(m).__name__ and getattr(m, "weight", None) is not None]
    handles = [norm.register_forward_hook(remember) for norm in norms]
    handles += [m.register_forward_pre_hook(look_up) for m in base.modules() if isinstance(m, nn.Linear)]
    tokens = torch.full((1, _PROBE), 1, device=device_of(base))
    training = base.training
    try:
        with torch.no_grad():
            base.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens), decoder_input_ids=tokens)
    finally:
        base.train(training)
        for handle in handles:
            handle.remove()
    return {linear: _gain(norm) for linear, norm in found.items()}


def _gain(norm: Any) -> torch.Tensor:
    """Return what a norm multiplies normalized values with: its weight, or 1 + weight as in Gemma.

    The latter does not output zero where the weight is zero.
    """
    probe = copy.deepcopy(norm)
    with torch.no_grad():
        probe.weight.zero_()
        if getattr(probe, "bias", None) is not None:
            probe.bias.zero_()
        values = torch.linspace(-1, 1, norm.weight.shape[0], dtype=norm.weight.dtype, device=norm.weight.device)
        offset = float(probe(values[None]).abs().max() > 0)
    return norm.weight.detach() + offset
