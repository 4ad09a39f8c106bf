"""Record the activations of a parallel corpus, shared by all processes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from ..adapter.language_tokens import language_token_ids
from ..neurons.activations import ACTIVITY, ATTRIBUTION, ActivationCounts, record_activations
from ..neurons.attribution import record_attribution
from ..neurons.observation import recording_bar
from .processes import this_process
from .recording import corpus_batches
from .tokenization import resolve_tokens


def record_corpus(model: Any, tokenizer: Any, corpus: Mapping[str, Dataset], **options: Any) -> ActivationCounts:
    """Count the activations of a corpus, or sum attribution; see `record_corpus_parts` for the options."""
    (counts,) = record_corpus_parts(model, tokenizer, corpus, parts=1, **options)
    return counts


def record_corpus_parts(
    model: Any,
    tokenizer: Any,
    corpus: Mapping[str, Dataset],
    *,
    language_tokens: Mapping[str, str] | None = None,
    source_tag: str = "source",
    max_length: int = 128,
    batch_size: int = 64,
    count_padding: bool = False,
    measure: str = ACTIVITY,
    parts: int = 1,
    seed: int = 0,
) -> list[ActivationCounts]:
    """Count activations over a corpus, split at random into parts so that the stability of masks can be measured.

    Every process counts a share of the batches and the counts are summed, so that all get the same.

    Args:
        model: a seq2seq model, with adapters (each pair then runs under its masks) or without.
        tokenizer: its tokenizer.
        corpus: pair → Dataset with columns "source" and "target".
        language_tokens: language code → language token, where codes are not tokens themselves.
        source_tag: what the tag on the source side names.
        max_length: truncate both sides to this many tokens, or to the model's positions if there are fewer.
        batch_size: sentence pairs per batch.
        count_padding: count padding positions too.
        measure: "activity", or "attribution" (see `record_attribution`).
        parts: number of disjoint parts.
        seed: of the order in which sentences are assigned to parts.

    Returns:
        Counts of each part; `counts[0].merge(*counts[1:])` are those of the corpus.

    Raises:
        ValueError: if a direction has fewer sentence pairs than there are parts, or the measure is unknown.
    """
    if measure not in (ACTIVITY, ATTRIBUTION) or (count_padding and measure == ATTRIBUTION):
        raise ValueError(
            f"measure is {ACTIVITY!r} or, without count_padding, {ATTRIBUTION!r}; got {measure!r}"
            f"{' with count_padding' if count_padding else ''}."
        )
    tokens = resolve_tokens(tokenizer, corpus, language_tokens, source_tag)
    token_ids = language_token_ids(tokenizer, tokens)
    for pair, rows in corpus.items():
        if len(rows) < parts:
            raise ValueError(f"{pair} has {len(rows)} sentence pairs, which cannot be split into {parts} parts.")

    def part_of(rows: Dataset, part: int) -> Dataset:
        return rows.select(np.random.default_rng(seed).permutation(len(rows))[part::parts])

    options: dict[str, Any] = {"language_tokens": tokens, "source_tag": source_tag, "max_length": max_length}
    split = [{pair: part_of(rows, part) for pair, rows in corpus.items()} for part in range(parts)]
    recordings = [corpus_batches(model, tokenizer, part, batch_size=batch_size, **options) for part in split]
    every = [loader for recording in recordings for loader in recording.values()]
    with recording_bar(every, this_process().is_main_process) as bar:
        shown: dict[str, Any] = {"progress": bar, "language_token_ids": token_ids}
        if measure == ATTRIBUTION:
            return [record_attribution(model, part, source_tag, **shown).all_reduce() for part in recordings]
        return [
            record_activations(model, part, count_padding, source_tag, **shown).all_reduce() for part in recordings
        ]
