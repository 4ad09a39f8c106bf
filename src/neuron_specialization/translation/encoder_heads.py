"""Heads on encoder states, for classification of texts and tagging of words: probing (frozen) and fine-tuning.

The head is that of Helsinki-NLP's study of translation as pretraining (2024): dropout 0.1, Linear, GELU, Linear, on
the mean or the sum of the encoder's states, or, for tagging, on the state of each word's first subword.
"""

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PrinterCallback, Trainer, TrainingArguments, set_seed

from ..adapter.language_tokens import check_language_tokens
from ..neurons.base_model import make_trainable
from .checkpoints import load_checkpoint
from .processes import this_process
from .tokenization import language_tags
from .understanding import Examples

POOLINGS = ("mean", "sum")
NO_PREDICTION = -1  # for words beyond the longest input
_IGNORED = -100


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


def check_has_encoder(location: str) -> None:
    """Refuse a checkpoint without encoder, before anything of it but its configuration is loaded.

    Raises:
        ValueError: if there is no configuration, or it describes a model that is not an encoder-decoder.
    """
    if Path(location).is_dir() and not (Path(location) / "config.json").is_file():
        load_checkpoint(location)  # says what the directory is instead
    try:
        config = AutoConfig.from_pretrained(location)
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot load {location!r}: expected a checkpoint directory or Hub id ({error}).") from error
    if not config.is_encoder_decoder:
        raise ValueError(
            f"{location} is a {config.model_type} checkpoint, which has no encoder beside a decoder. Expected an "
            "encoder-decoder model, such as M2M100, NLLB, mBART or T5."
        )


def load_encoder(location: str) -> tuple[Any, Any]:
    """Return the encoder of a seq2seq checkpoint, in eval mode on this process's device, and its tokenizer."""
    model, tokenizer = load_checkpoint(location)
    return model.get_encoder().eval().to(this_process().device), tokenizer


def random_encoder(location: str, seed: int) -> Any:
    """Return an untrained encoder with the architecture of a checkpoint, its weights drawn from `seed`."""
    set_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(location))
    return model.get_encoder().eval().to(this_process().device)


def language_tag(tokenizer: Any, language: str, source: str, tokens: Mapping[str, str]) -> str | None:
    """Return the language token that text of a language is encoded with, or None if the tokenizer adds none.

    Args:
        tokenizer: the model's tokenizer.
        language: language code.
        source: the language that heads are trained on. Its token stands in for languages that have none.
        tokens: language code → token, or several separated by commas, of which the tokenizer must have one.

    Raises:
        ValueError: if the tokenizer has none of the tokens named for the language, or none for the source language.
    """
    if not hasattr(tokenizer, "src_lang"):
        return None
    for token in tokens.get(language, language).split(","):
        try:
            check_language_tokens(tokenizer, {language: token})
        except ValueError:
            continue
        return token
    if language in tokens or language == source:
        check_language_tokens(tokenizer, {language: tokens.get(language, language)})
    return language_tag(tokenizer, source, source, tokens)


def subwords(tokenizer: Any, examples: Examples, tagging: bool) -> list[list[list[int]]]:
    """Return token ids without special ones: per example, per text or (tagging) per word.

    Words are cut one by one. One that the tokenizer makes nothing of is its unknown token.
    """
    unique = list(dict.fromkeys(text for texts in examples.texts for text in texts))
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    ids = dict(zip(unique, tokenizer(unique, **options)["input_ids"], strict=True))
    empty = [tokenizer.unk_token_id] if tagging else []
    return [[ids[text] or empty for text in texts] for texts in examples.texts]


def encode_examples(
    tokenizer: Any, examples: Examples, tagging: bool, tag: str | None, max_length: int = 128
) -> list[dict[str, Any]]:
    """Tokenize labeled text for an encoder.

    Args:
        tokenizer: the model's tokenizer.
        examples: n examples in one language.
        tagging: whether labels are of words.
        tag: language token, see `language_tag`.
        max_length: longest input in tokens. Two texts are joined by the end-of-sentence token.

    Returns:
        n rows: "input_ids"; "labels", -100 for words beyond the longest input; and for tagging "positions", of the
        first subword of each word.
    """
    before, after = _surroundings(tokenizer, tag)
    room = max_length - len(before) - len(after)
    rows = []
    for parts, labels in zip(subwords(tokenizer, examples, tagging), examples.labels, strict=True):
        if not tagging and len(parts) > 1:
            parts = [parts[0], [tokenizer.eos_token_id], *parts[1:]]
        starts = np.cumsum([0, *map(len, parts)])[:-1]
        ids = [i for part in parts for i in part][:room]
        row: dict[str, Any] = {"input_ids": [*before, *ids, *after], "labels": labels}
        if tagging:
            fits = starts < room
            row["labels"] = np.where(fits, labels, _IGNORED).tolist()
            row["positions"] = np.where(fits, starts + len(before), 0).tolist()
        rows.append(row)
    return rows


def _surroundings(tokenizer: Any, tag: str | None) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after a text: language token, end of sentence, ..."""
    text = "a"
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tag is None:
        whole = tokenizer(text)["input_ids"]
    else:
        with language_tags(tokenizer, tag, tag):
            whole = tokenizer(text)["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad rows of `encode_examples`, or rows with "labels" and cached "states", into a batch."""

    def pad(name: str, value: int) -> torch.Tensor:
        return pad_sequence([torch.as_tensor(row[name]) for row in rows], batch_first=True, padding_value=value)

    batch = {"labels": pad("labels", _IGNORED)}
    if "states" in rows[0]:
        return {**batch, "states": pad("states", 0)}
    # the attention mask hides what pads input_ids, so any id serves
    batch |= {"input_ids": pad("input_ids", 0)}
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    if "positions" in rows[0]:
        batch["positions"] = pad("positions", 0)
    return batch


def unit_states(
    encoder: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    positions: torch.Tensor | None = None,
    pooling: str = "mean",
) -> torch.Tensor:
    """Return the states that a head reads: [batch, units, d_model], one unit per text, or per word when tagging.

    Args:
        encoder: the encoder.
        input_ids: int64 [batch, length].
        attention_mask: int64 [batch, length]; padding takes no part.
        positions: first subword of each word, int64 [batch, words]; None for classification.
        pooling: how a text's states become one, "mean" or "sum".
    """
    hidden = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    if positions is not None:
        return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
    kept = attention_mask[..., None].to(hidden.dtype)
    total = (hidden * kept).sum(1, keepdim=True)
    return total if pooling == "sum" else total / kept.sum(1, keepdim=True)


def cache_states(
    encoder: Any, rows: Sequence[Mapping[str, Any]], pooling: str, batch_size: int = 64
) -> list[dict[str, Any]]:
    """Return rows with "states" [units, d_model] on the CPU instead of tokens, computed once for all heads."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    cached: dict[int, dict[str, Any]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = {k: v.to(encoder.device) for k, v in collate([rows[i] for i in chosen]).items() if k != "labels"}
        with torch.no_grad():
            states = unit_states(encoder, **batch, pooling=pooling).float().cpu()
        for i, found in zip(chosen, states, strict=True):
            labels = rows[i]["labels"]
            cached[i] = {"labels": labels, "states": found[: len(labels)].clone()}
    return [cached[i] for i in range(len(rows))]


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
        np.where(np.array(row["labels"]) == _IGNORED, NO_PREDICTION, found[: len(row["labels"])])
        for row, found in zip(rows, predicted, strict=True)
    ]
    return np.concatenate(read).astype(np.int16)
