"""Cross-entropy from the decoder's hidden states, without the logits of a whole batch.

With a vocabulary of 256,206 entries (NLLB), 4,096 target tokens make 4.2 GB of float32 logits, and a training step
holds them several times. torch's `linear_cross_entropy` computes loss and gradients in chunks of tokens instead. It
has no label smoothing, but with z = x·Wᵀ + b the smoothed loss is exactly
`cross_entropy(z, target) + ε Σ (z_target - mean(z))`, and neither of the added terms needs logits.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DataParallel

from ..neurons.base_model import unwrap
from ..neurons.positions import IGNORED

CHUNK_LOGITS = 2**26  # logits computed at a time: 256 MB in float32
# Up to this many logits are computed without chunks. Above, chunks are faster (measured on a CPU, forward and
# backward, for 2**25 to 2**28 logits: 0.6 to 0.96 of the time); below, they take 1.0 to 1.5 times as long.
FEW_LOGITS = 2**24
_BIAS = "final_logits_bias"  # what BART, Marian, mBART and others add to their head's output


@dataclass(frozen=True)
class LinearHead:
    """The output projection of a model whose logits are that projection, plus a bias that the model adds.

    Attributes:
        linear: the projection, d_model → vocabulary.
        model: the model that has it.
        adds_bias: whether the model adds its `final_logits_bias`.
    """

    linear: nn.Linear
    model: Any
    adds_bias: bool

    @contextmanager
    def computes_loss(self, labels: torch.Tensor, smoothing: float) -> Iterator[None]:
        """Within the context, the model's "logits" are the loss [1, 1, 1], summed over the tokens that count.

        The head computes it: only there, in the model's forward, is a sharded weight whole.

        Args:
            labels: int64 [batch, length]; -100 does not count.
            smoothing: label smoothing ε.
        """
        bias = getattr(self.model, _BIAS, None)

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            total = self.linear.bias
            if bias is not None and self.adds_bias:
                total = bias.flatten() if total is None else total + bias.flatten()
            states = hidden.flatten(0, 1)
            return summed_cross_entropy(states, self.linear.weight, labels.flatten(), total, smoothing).view(1, 1, 1)

        self.linear.forward = forward  # type: ignore[assignment,method-assign]
        try:
            if bias is not None:
                setattr(self.model, _BIAS, bias.new_zeros(1, 1))
            yield
        finally:
            del self.linear.forward
            if bias is not None:
                setattr(self.model, _BIAS, bias)


def summed_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the cross-entropy of the logits `hidden @ weight.T + bias`, summed over the tokens that count.

    Args:
        hidden: [tokens, d_model].
        weight: [vocabulary, d_model]; its gradient is computed only if it is trained.
        labels: int64 [tokens]; -100 does not count.
        bias: [vocabulary].
        smoothing: label smoothing ε.
    """
    counted = labels != IGNORED
    hidden, labels = hidden[counted], labels[counted]
    device = hidden.device.type
    if torch.is_autocast_enabled(device):  # as the linear layer would compute
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        if len(labels) * len(weight) <= FEW_LOGITS or hidden.dtype == torch.float16:
            # few logits are faster without chunks; in float16, chunks would compute gradients before loss scaling
            return logits_cross_entropy(F.linear(hidden, weight, bias), labels, smoothing)
        chunks = nn.LinearCrossEntropyOptions(
            batch_chunk_size=max(1, CHUNK_LOGITS // len(weight)), chunking_method=None
        )
        # in bfloat16 a sum would be rounded to 8 bits at every chunk
        reduction = "none" if hidden.dtype == torch.bfloat16 else "sum"
        loss = F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, reduction=reduction, options=chunks)
        loss = loss.sum(dtype=torch.promote_types(loss.dtype, torch.float32))
        if smoothing:
            loss = loss + smoothing * _target_over_mean(hidden, weight, labels, bias)
        return loss


def logits_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Return the cross-entropy of logits [tokens, vocabulary], summed over the tokens whose label is not -100."""
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(precise, labels, reduction="sum", label_smoothing=smoothing)


def _target_over_mean(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return Σ (z_target - mean(z)) over tokens, in float32 at least."""
    precise = torch.promote_types(hidden.dtype, torch.float32)
    difference = (hidden * (F.embedding(labels, weight) - weight.mean(0))).sum(dtype=precise)
    return difference if bias is None else difference + (bias[labels] - bias.mean()).sum(dtype=precise)


@torch.no_grad()
def find_linear_head(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> LinearHead | None:
    """Return the head of `model` if a run shows that the logits are a plain linear layer of the head's input.

    Returns None for anything else (soft caps, hooks or adapters on the head, other layer types, compiled models): the
    loss is then computed from logits.

    Args:
        model: a seq2seq model, in the wrappers that it is trained in.
        batch: a training batch with labels; its first sample is run once.
    """
    base = unwrap(model)
    linear = base.get_output_embeddings()
    if type(linear) is not nn.Linear or _is_hooked(linear):
        return None
    if isinstance(model, DataParallel) or any(_is_compiled(module) for module in model.modules()):
        return None
    seen: list[tuple[Any, Any, Any]] = []
    handle = linear.register_forward_hook(lambda module, args, output: seen.append((args[0], module.weight, output)))
    training = model.training
    try:
        first = {name: value[:1] for name, value in batch.items() if name != "labels"}
        logits = model.eval()(**first)["logits"]
    finally:
        handle.remove()
        model.train(training)
    if len(seen) != 1:
        return None
    hidden, weight, output = seen[0]
    plain = type(weight) in (nn.Parameter, torch.Tensor) and type(output) is torch.Tensor  # not quantized or sharded
    if not plain or hidden.shape[:-1] != batch["labels"][:1].shape:
        return None
    bias = getattr(base, _BIAS, None)
    if bias is not None and logits.equal((output + bias).to(logits.dtype)):
        return LinearHead(linear, base, adds_bias=True)
    return LinearHead(linear, base, adds_bias=False) if logits.equal(output.to(logits.dtype)) else None


def _is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, which expect its real output, or a forward of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
