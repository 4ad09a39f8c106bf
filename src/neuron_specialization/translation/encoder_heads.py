"""Heads on encoder states, for classification of texts and tagging of words: probing (frozen) and fine-tuning.

The head is that of Helsinki-NLP's study of translation as pretraining (2024): dropout 0.1, Linear, GELU, Linear, on
the mean or the sum of the encoder's states, or, for tagging, on the state of each word's first subword.
"""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from ..neurons.base_model import make_trainable
from ..neurons.positions import IGNORED
from .encoders import collate, unit_states

POOLINGS = ("mean", "sum")
NO_PREDICTION = -1  # for words beyond the longest input


@dataclass(frozen=True)
class HeadTraining:
    """How a head is trained, and the encoder with it if that is fine-tuned.

    Attributes:
        epochs: passes over the training data. The last state counts: nothing is chosen on other languages.
        learning_rate: peak, reached after a tenth of the updates and then falling linearly to zero.
        batch_size: examples per update.
        pooling: "mean" or "sum" of the states of a text, for classification.
    """

    epochs: float
    learning_rate: float
    batch_size: int = 32
    pooling: str = "mean"

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"Expected pooling 'mean' or 'sum', got {self.pooling!r}.")


class EncoderHead(nn.Module):
    """A classifier of texts or words on encoder states.

    Args:
        width: d_model of the encoder.
        labels: number of labels.
        encoder: the encoder to train with the head; None to read cached states.
        pooling: see `unit_states`.
        dropout: before the first projection.
    """

    def __init__(
        self, width: int, labels: int, encoder: Any = None, pooling: str = "mean", dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        layers = nn.Dropout(dropout), nn.Linear(width, width), nn.GELU(), nn.Linear(width, labels)
        self.head = nn.Sequential(*layers)

    def forward(
        self,
        labels: torch.Tensor,
        states: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return "loss", the mean cross-entropy over units, and "logits" [batch, units, labels].

        Takes either `states` [batch, units, d_model], or what `unit_states` takes. Labels are int64 [batch, units],
        -100 where there is no unit.
        """
        if states is None:
            assert input_ids is not None and attention_mask is not None
            states = unit_states(self.encoder, input_ids, attention_mask, positions, self.pooling)
        logits = self.head(states).float()
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def train_and_predict(
    encoder: Any,
    train: Sequence[Mapping[str, Any]],
    tests: Mapping[str, Sequence[Mapping[str, Any]]],
    labels: int,
    training: HeadTraining,
    seed: int,
) -> dict[str, np.ndarray]:
    """Train a head from `seed`, and a copy of the encoder with it unless the rows hold cached states.

    Args:
        encoder: gives the width, and the encoder to fine-tune; it is left as it is.
        train: rows of `encode_examples` (fine-tuning) or of `cache_states` (probing).
        tests: language → rows of the same kind.
        labels: number of labels.
        training: how to train.
        seed: of the head's first weights, dropout and the order of batches.

    Returns:
        Language → predicted labels of all units, one example after another, int16; -1 for words beyond the longest
        input.
    """
    set_seed(seed)
    probing = "states" in train[0]
    tuned = None if probing else make_trainable(copy.deepcopy(encoder))
    model = EncoderHead(encoder.config.hidden_size, labels, tuned, training.pooling)
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            model,
            TrainingArguments(
                directory,
                num_train_epochs=training.epochs,
                learning_rate=training.learning_rate,
                per_device_train_batch_size=training.batch_size,
                per_device_eval_batch_size=2 * training.batch_size,
                warmup_steps=0.1,
                seed=seed,
                use_cpu=encoder.device.type == "cpu",
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
            ),
            data_collator=collate,
            train_dataset=train,
            preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return {language: _predict(trainer, rows) for language, rows in tests.items()}


def _predict(trainer: Trainer, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    predicted: Any = trainer.predict(rows).predictions  # type: ignore[arg-type]
    read = [
        np.where(np.array(row["labels"]) == IGNORED, NO_PREDICTION, found[: len(row["labels"])])
        for row, found in zip(rows, predicted, strict=True)
    ]
    return np.concatenate(read).astype(np.int16)
