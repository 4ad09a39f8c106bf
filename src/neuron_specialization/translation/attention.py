"""The cross-attention of a sentence pair, to be looked at."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..adapter.routing import pair_argument
from ..neurons.base_model import device_of, moved, unwrap
from .batching import TranslationCollator
from .tokenization import encode, resolve_tokens


def example_sentence(rows: Dataset) -> tuple[str, str]:
    """Return source and target of the first sentence pair with 5 to 8 source words, or of that nearest to as many."""
    lengths = [len(source.split()) for source in rows["source"]]
    found = rows[min(range(len(rows)), key=lambda i: max(5 - lengths[i], lengths[i] - 8, 0))]
    return found["source"], found["target"]


def cross_attention(
    model: Any,
    tokenizer: Any,
    source: str,
    target: str,
    pair: str,
    *,
    language_tokens: Mapping[str, str] | None = None,
    source_tag: str = "source",
) -> tuple[np.ndarray, list[str], list[str]]:
    """Return which source tokens each target token of a sentence pair looks at, with teacher forcing.

    Args:
        model: a seq2seq model, with adapters (then under the masks of `pair`) or without.
        tokenizer: its tokenizer.
        source: the source sentence.
        target: the target sentence.
        pair: the direction.
        language_tokens: language code → language token, where codes are not tokens themselves.
        source_tag: what the tag on the source side names.

    Returns:
        Weights of the last decoder layer, averaged over its heads, float64 [target, source], in the row of the token
        that is predicted; and the tokens of both sides.
    """
    tokens = resolve_tokens(tokenizer, [pair], language_tokens, source_tag)
    encoded = encode(tokenizer, pair, [source], [target], tokens, source_tag)
    batch = TranslationCollator(tokenizer, model)([{name: rows[0] for name, rows in encoded.items()}])
    batch = moved(batch, device_of(model))
    base = unwrap(model)
    before, training = base.config._attn_implementation, model.training
    base.set_attn_implementation("eager")  # the others do not return weights
    model.eval()
    try:
        with torch.no_grad():
            weights = model(**batch, **pair_argument(model, pair), output_attentions=True).cross_attentions[-1]
    finally:
        base.set_attn_implementation(before)
        model.train(training)
    sides = (tokenizer.convert_ids_to_tokens(encoded[side][0]) for side in ("input_ids", "labels"))
    return weights[0].double().mean(0).cpu().numpy(), *sides
