"""Loss of a model on parallel text, per direction."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset

from ..adapter.routing import pair_argument
from ..neurons.base_model import device_of, fixed_positions, moved
from ..neurons.language_pairs import split_pair
from ..neurons.positions import IGNORED
from .batching import TranslationCollator
from .loss import find_linear_head, logits_cross_entropy
from .tokenization import encode, resolve_tokens


def token_losses(
    model: Any,
    tokenizer: Any,
    data: Mapping[str, Dataset],
    *,
    language_tokens: Mapping[str, str] | None = None,
    source_tag: str = "source",
    batch_size: int = 64,
    max_length: int | None = None,
) -> dict[str, float]:
    """Return pair → cross-entropy in nats per target token, without label smoothing, in eval mode.

    The target's language tag is left out wherever it is among the labels. In generation it is given. A model without
    information about the direction cannot predict it, while a model with the direction's mask, or of that direction
    alone, can; the loss would otherwise favor the latter by up to log(number of targets) per sentence.

    Args:
        model: a seq2seq model, with adapters (each pair then runs under its masks) or without.
        tokenizer: its tokenizer.
        data: pair → Dataset with columns "source" and "target".
        language_tokens: language code → language token, where codes are not tokens themselves.
        source_tag: what the tag on the source side names.
        batch_size: sentence pairs per batch.
        max_length: truncate both sides to this many tokens; None truncates nothing.

    Raises:
        ValueError: if a side of a sentence pair has more tokens than the model has positions.
    """
    tokens = resolve_tokens(tokenizer, data, language_tokens, source_tag)
    device = device_of(model)
    training = model.training
    model.eval()
    losses, head, first = {}, None, True
    try:
        for pair, rows in data.items():
            nats, count = 0.0, 0
            for batch in scored_batches(model, tokenizer, pair, rows, tokens, source_tag, batch_size, max_length):
                here = moved(batch, device)
                if first:
                    head, first = find_linear_head(model, here), False
                labels = here.pop("labels")
                with torch.no_grad(), head.computes_loss(labels, 0.0) if head else nullcontext():
                    logits = model(**here).logits
                    found = logits if head else logits_cross_entropy(logits.flatten(0, 1), labels.flatten(), 0.0)
                nats += found.item()
                count += int(labels.ne(IGNORED).sum())
            losses[pair] = nats / count
    finally:
        model.train(training)
    return losses


def check_positions(model: Any, pair: str, encoded: Mapping[str, list]) -> None:
    """Raise ValueError if a side of a sentence pair, as `encode` returns them, has more tokens than positions."""
    limit = fixed_positions(model)
    if limit is None:
        return
    for name, side in (("source", "input_ids"), ("target", "labels")):
        for number, row in enumerate(encoded[side], 1):
            if len(row) > limit:
                raise ValueError(
                    f"The {name} of sentence pair {number} of {pair} has {len(row)} tokens, but the model has "
                    f"positions for {limit}, and a loss truncates nothing. Leave long sentences out (max_characters)."
                )


def scored_batches(
    model: Any,
    tokenizer: Any,
    pair: str,
    rows: Dataset,
    tokens: Mapping[str, str],
    source_tag: str = "source",
    batch_size: int = 64,
    max_length: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield one direction's batches, of similar length, as the model's forward takes them, with labels.

    The target's language tag is not among the labels (see `token_losses`). With adapters of ours a batch names its
    pair.

    Args:
        model: the model that the batches are for.
        tokenizer: its tokenizer.
        pair: the direction.
        rows: Dataset with columns "source" and "target".
        tokens: language code → language token.
        source_tag: what the tag on the source side names.
        batch_size: sentence pairs per batch.
        max_length: truncate both sides to this many tokens; None truncates nothing.
    """
    collate = TranslationCollator(tokenizer, model)
    encoded = encode(tokenizer, pair, rows["source"], rows["target"], tokens, source_tag, max_length)
    check_positions(model, pair, encoded)
    examples = [
        {"input_ids": source, "labels": target}
        for source, target in zip(encoded["input_ids"], encoded["labels"], strict=True)
    ]
    examples.sort(key=lambda e: len(e["input_ids"]) + len(e["labels"]))
    route = pair_argument(model, pair)
    tag = tokenizer.convert_tokens_to_ids(tokens[split_pair(pair)[1]])
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size])
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == tag, IGNORED)
        yield {**batch, **route}
