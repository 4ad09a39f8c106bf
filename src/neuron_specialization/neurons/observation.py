"""Run a model so that hooks see all of its activations, and add up what several processes saw."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .base_model import unwrap


class _BeforeHead(Exception):
    """Raised by the hook that stops a forward pass before the LM head."""


@contextmanager
def observed(model: nn.Module) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that runs a batch for its hooks: in eval mode, without gradients, LM head or compiled code."""

    def run(batch: Mapping[str, Any]) -> None:
        try:
            model(**batch)
        except _BeforeHead:
            pass

    with _headless(unwrap(model)), _plain_execution(model), torch.no_grad():
        yield run


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Within the context, losses of a model are differentiated by its activations alone: parameters are frozen and get
    no gradient. The model runs in eval mode, never compiled."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with _plain_execution(model), torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def recording_bar(texts: Iterable[Iterable], progress: bool | tqdm = True) -> AbstractContextManager[tqdm]:
    """Return the progress bar of a recording, one for all of its texts, as a context manager.

    Args:
        texts: the batches of each text, whose number is shown where it is known.
        progress: whether to show it; or the bar to advance, which stays open.
    """
    if isinstance(progress, tqdm):
        return nullcontext(progress)
    sizes = [len(part) if isinstance(part, Sized) else None for part in texts]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    return tqdm(desc="recording", total=total, unit=" batches", disable=not progress, leave=False)


def is_distributed() -> bool:
    """Whether several processes run, in `torch.distributed`."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes, on the CPU; of a single process, the tensor itself."""
    if not is_distributed():
        return tensor
    moved = tensor.to("cuda" if torch.distributed.get_backend() == "nccl" else "cpu", copy=True)
    torch.distributed.all_reduce(moved)
    return moved.cpu()


@contextmanager
def _headless(model: Any) -> Iterator[None]:
    """Stop every forward pass at the output embedding, the costliest layer of a model with a large vocabulary."""
    head = model.get_output_embeddings()
    if head is None or isinstance(head, nn.Embedding):  # FSMT's is the decoder's input embedding as well
        yield
        return

    def stop(module: nn.Module, args: tuple) -> None:
        raise _BeforeHead

    handle = head.register_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _plain_execution(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, module by module and each FFN in one piece, so that hooks see every position.

    Code that was compiled before hooks were attached does not run them. BERT's layers may split the positions into
    chunks (`chunk_size_feed_forward`), which saves memory and does not change results.
    """
    modules: list[Any] = list(model.modules())
    training = [module for module in modules if module.training]
    chunks = {m: m.chunk_size_feed_forward for m in modules if hasattr(m, "chunk_size_feed_forward")}
    model.eval()
    for module in chunks:
        module.chunk_size_feed_forward = 0
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True
        for module, size in chunks.items():
            module.chunk_size_feed_forward = size
