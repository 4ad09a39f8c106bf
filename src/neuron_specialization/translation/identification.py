"""Record the activations of a parallel corpus, shared by all processes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import DataLoader

from ..adapter.language_tokens import language_token_ids
from ..adapter.routing import is_routed
from ..neurons.activations import ACTIVITY, ATTRIBUTION, ActivationCounts, record_activations
from ..neurons.attribution import record_attribution
from ..neurons.base_model import number_of_positions
from ..neurons.observation import recording_bar
from .batching import TranslationCollator
from .processes import this_process
from .tokenization import encode, resolve_tokens


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
    tokens = resolve_tokens(tokenizer, corpus, language_tokens)
    max_length = min(max_length, number_of_positions(model) or max_length)
    token_ids = language_token_ids(tokenizer, tokens)
    collate = TranslationCollator(tokenizer, model)
    encoded = {}
    for pair, rows in corpus.items():
        if len(rows) < parts:
            raise ValueError(f"{pair} has {len(rows)} sentence pairs, which cannot be split into {parts} parts.")
        batch = encode(tokenizer, pair, rows["source"], rows["target"], tokens, source_tag, max_length)
        encoded[pair] = [
            {"input_ids": source, "labels": target}
            for source, target in zip(batch["input_ids"], batch["labels"], strict=True)
        ]

    def batches(pair: str, part: int) -> DataLoader:
        order = np.random.default_rng(seed).permutation(len(encoded[pair]))[part::parts]
        examples = sorted((encoded[pair][i] for i in order), key=lambda e: len(e["input_ids"]) + len(e["labels"]))
        whole = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
        route = {"language_pairs": [pair]} if is_routed(model) else {}
        state = this_process()
        # processes get whole batches, so that their number changes no batch
        return DataLoader(
            whole[state.process_index :: state.num_processes],  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=lambda share: {**collate(share), **route},
        )

    recordings = [{pair: batches(pair, part) for pair in encoded} for part in range(parts)]
    every = [loader for recording in recordings for loader in recording.values()]
    with recording_bar(every, this_process().is_main_process) as bar:
        shown: dict[str, Any] = {"progress": bar, "language_token_ids": token_ids}
        if measure == ATTRIBUTION:
            return [record_attribution(model, part, source_tag, **shown).all_reduce() for part in recordings]
        return [
            record_activations(model, part, count_padding, source_tag, **shown).all_reduce() for part in recordings
        ]
