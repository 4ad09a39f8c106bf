"""Gradual specialization: training begins with all active neurons, and the masks shrink to those of k.

The schedule is cubic (Zhu & Gupta, 2018; for language-specific sub-networks, He et al., 2023):
1 - k_t = (1 - k) · [1 - (1 - (t - t1) / t2)³], where t1 and t2 are shares of the updates.
"""

from dataclasses import replace
from typing import Any

from peft import get_peft_model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adapter.config import NeuronSpecializationConfig
from ..neurons.activations import ActivationCounts
from ..neurons.base_model import unwrap
from ..neurons.selection import CumulativeThreshold

BEGINS, LASTS = 0.05, 0.45  # t1 and t2, as shares of the updates


def k_at(k: float, update: int, updates: int) -> float:
    """Return k_t in the update with this number, counted from 0. The last update has the final k in every case."""
    progress = (update / updates - BEGINS) / LASTS
    if progress >= 1 or update >= updates - 1:
        return k
    return 1 - (1 - k) * (1 - (1 - max(progress, 0.0)) ** 3)


def gradual(model: Any, counts: ActivationCounts, k: float) -> Any:
    """Return `model` under the masks that its training begins with; `GradualMasks` shrinks them.

    Args:
        model: a seq2seq model without adapters; it is changed.
        counts: its activations.
        k: the final share of `CumulativeThreshold`.
    """
    schedule = {"name": "gradual", "k": k, "begins": BEGINS, "lasts": LASTS}
    masks = replace(CumulativeThreshold(1.0).select(counts), selector=schedule)
    config = NeuronSpecializationConfig(
        masks=masks, trainable="full", source_tag=counts.source_tag, task_type="SEQ_2_SEQ_LM"
    )
    return get_peft_model(model, config)


class GradualMasks(TrainerCallback):
    """Set the masks of each update: a function of its number alone, so a resumed run and every process have the same.

    A row of W1 that no pair selects any more stays at the value that it has by then. The best validation loss is that
    of the final masks: what was measured under larger ones does not count.

    Args:
        model: what `gradual` returned.
        counts: the activations that the masks are selected from.
        k: the final share.
    """

    def __init__(self, model: Any, counts: ActivationCounts, k: float) -> None:
        self.model, self.counts, self.k = model, counts, k
        self.current: float | None = None  # the k of the masks that are set

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        k = k_at(self.k, state.global_step, state.max_steps)
        if k != self.current:
            self.current = k
            for name, rows in CumulativeThreshold(k).select(self.counts).rows.items():
                unwrap(self.model).get_submodule(name).replace_mask(self.model.active_adapter, rows)
        if k == self.k and state.global_step and k_at(self.k, state.global_step - 1, state.max_steps) != k:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
