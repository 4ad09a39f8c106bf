"""Loss of a model on parallel text, per direction."""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional as F

from ..adapter.routing import is_routed
from ..neurons.language_pairs import split_pair
from ..neurons.positions import IGNORED
from .batching import TranslationCollator
from .tokenization import encode, resolve_tokens


def token_losses(
    model: Any,
    tokenizer: Any,
    data: Mapping[str, Dataset],
    *,
    language_tokens: Mapping[str, str] | None = None,
    source_tag: str = "source",
    batch_size: int = 64,
) -> dict[str, float]:
    """Return pair → cross-entropy in nats per target token, without label smoothing, in eval mode.

    The target's language tag is left out wherever it is among the labels. In generation it is given. A model without
    information about the direction cannot predict it, while a model with the direction's mask, or of that direction
    alone, can; the loss would otherwise favor the latter by up to log(number of targets) per sentence.

    Args:
        model: a seq2seq model, with adapters (each pair then runs under its masks) or without.
        tokenizer: its tokenizer.
        data: pair → Dataset with columns "source" and "target"; nothing is truncated.
        language_tokens: language code → language token, where codes are not tokens themselves.
        source_tag: what the tag on the source side names.
        batch_size: sentence pairs per batch.
    """
    tokens = resolve_tokens(tokenizer, data, language_tokens)
    collate = TranslationCollator(tokenizer, model)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    losses = {}
    try:
        for pair, rows in data.items():
            encoded = encode(tokenizer, pair, rows["source"], rows["target"], tokens, source_tag)
            examples = [
                {"input_ids": source, "labels": target}
                for source, target in zip(encoded["input_ids"], encoded["labels"], strict=True)
            ]
            examples.sort(key=lambda e: len(e["input_ids"]) + len(e["labels"]))
            route = {"language_pairs": [pair]} if is_routed(model) else {}
            tag = tokenizer.convert_tokens_to_ids(tokens[split_pair(pair)[1]])
            nats, count = 0.0, 0
            for start in range(0, len(examples), batch_size):
                batch = {name: t.to(device) for name, t in collate(examples[start : start + batch_size]).items()}
                labels = batch.pop("labels")
                labels = labels.masked_fill(labels == tag, IGNORED)
                with torch.no_grad():
                    logits = model(**batch, **route).logits.float()
                nats += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
                count += int(labels.ne(IGNORED).sum())
            losses[pair] = nats / count
    finally:
        model.train(training)
    return losses
