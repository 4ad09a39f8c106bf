"""The smallest k whose masks cost next to nothing before any training."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from peft import PeftModel, get_peft_model

from ..adapter.config import NeuronSpecializationConfig
from ..neurons.activations import ActivationCounts
from ..neurons.masks import NeuronMasks
from ..neurons.selection import CumulativeThreshold
from .token_loss import token_losses

AUTO = "auto"
GRID = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 0.998, 0.999, 1.0)


@dataclass(frozen=True)
class SmallestK:
    """What a search for k found.

    Attributes:
        k: the k found.
        masks: its masks, whose `selector` holds the rule and the loss too.
        base_loss: loss of the model without masks.
        losses: k → loss under its masks, in the order in which they were tried.
    """

    k: float
    masks: NeuronMasks
    base_loss: float
    losses: dict[float, float]

    def rows(self) -> list[dict[str, Any]]:
        """Return one table row per k tried, the smallest first, and one without masks."""
        losses = {**{f"k = {k}": loss for k, loss in sorted(self.losses.items())}, "none": self.base_loss}
        return [
            {"masks": masks, "loss": loss, "increase (%)": 100 * (loss / self.base_loss - 1)}
            for masks, loss in losses.items()
        ]


def parse_k(text: str) -> float | None:
    """Return the share that an option names, None for "auto".

    Raises:
        ValueError: if it is neither.
    """
    try:
        return None if text == AUTO else float(text)
    except ValueError:
        raise ValueError(f"k is a share in (0, 1], or {AUTO!r}; got {text!r}.") from None


def find_smallest_k(
    model: Any,
    tokenizer: Any,
    data: Mapping[str, Dataset],
    counts: ActivationCounts,
    tolerance: float = 0.01,
    **options: Any,
) -> SmallestK:
    """Find the smallest k of GRID whose masks, without training, raise the loss by at most a share `tolerance`.

    The loss is the mean over directions of nats per target token (see `token_losses`). It is taken to fall as k grows,
    so that the grid is bisected: the k found is within the tolerance, and the next smaller one, if any, is not. The
    grid starts at 0.5: a k of 0.5 means "at most 0.5".

    Args:
        model: the model that the counts were recorded on, without adapters; it is left as it is.
        tokenizer: its tokenizer.
        data: pair → Dataset with columns "source" and "target", for the pairs of the counts.
        counts: its activations.
        tolerance: share of the loss without masks.
        **options: passed to `token_losses`.

    Raises:
        ValueError: if no k is within the tolerance.
    """

    def mean_loss(of: Any) -> float:
        losses = token_losses(of, tokenizer, data, source_tag=counts.source_tag, **options)
        return sum(losses.values()) / len(losses)

    def is_within(k: float) -> bool:
        with _adapted(model, CumulativeThreshold(k).select(counts)) as adapted:
            tried[k] = mean_loss(adapted)
        return tried[k] <= base * (1 + tolerance)

    base = mean_loss(model)
    tried: dict[float, float] = {}
    place = bisect_left(GRID, True, key=is_within)
    if place == len(GRID):
        raise ValueError(
            f"Even the masks of k={GRID[-1]} raise the loss from {base:.4f} to {tried[GRID[-1]]:.4f} nats per token, "
            f"more than {tolerance:.1%}: neurons that the sample does not show to be active are masked. Use more "
            "sentences, or name a k and train under the masks."
        )
    k = GRID[place]
    masks = CumulativeThreshold(k).select(counts)
    rule = f"smallest of {len(GRID)} k from {GRID[0]} to {GRID[-1]} with at most {tolerance:.1%} more validation loss"
    selector = {**masks.selector, "k_rule": rule, "loss": tried[k], "loss_without_masks": base}
    return SmallestK(k, replace(masks, selector=selector), base, tried)


@contextmanager
def _adapted(model: Any, masks: NeuronMasks) -> Iterator[PeftModel]:
    """Run a model under masks, and leave it as it was."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    source_tag = masks.routes.source_tag
    config = NeuronSpecializationConfig(masks=masks, trainable="none", source_tag=source_tag, task_type="SEQ_2_SEQ_LM")
    adapted: Any = get_peft_model(model, config)
    try:
        yield adapted
    finally:
        adapted.unload()
        for parameter in trained:
            parameter.requires_grad_(True)
