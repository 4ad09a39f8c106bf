"""Batches of a corpus to record a model on, with the tags of their tokens if there are any."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader
from xxhash import xxh3_64_hexdigest

from ..adapter.routing import pair_argument
from ..neurons.base_model import number_of_positions
from ..neurons.positions import IGNORED
from .batching import TranslationCollator, pad_rows
from .encoding import vocabulary_of
from .processes import this_process
from .tagged_text import token_tags
from .tokenization import encode, resolve_tokens


def vocabulary_digest(tokenizer: Any) -> str:
    """Return what tells recordings made with different tokenizers apart, 16 hexadecimal digits."""
    return xxh3_64_hexdigest(vocabulary_of(tokenizer))


def corpus_batches(
    model: Any,
    tokenizer: Any,
    corpus: Mapping[str, Dataset],
    *,
    language_tokens: Mapping[str, str] | None = None,
    source_tag: str = "source",
    max_length: int = 128,
    batch_size: int = 64,
    tags: Sequence[str] = (),
) -> dict[str, DataLoader]:
    """Return each pair's batches, of similar length, as the recorders of this package take them.

    Whole batches are dealt to processes, so that the number of processes changes no batch.

    Args:
        model: the model to record, with adapters (batches then name their pair) or without.
        tokenizer: its tokenizer.
        corpus: pair → Dataset with columns "source" and "target"; with `tags` also "words", a list of the words of the
            source in their order, and "word_tags", as many.
        language_tokens: language code → language token, where codes are not tokens themselves.
        source_tag: what the tag on the source side names.
        max_length: truncate both sides to this many tokens, or to the model's positions if there are fewer.
        batch_size: sentence pairs per batch.
        tags: names of tags. Batches then hold "token_tags": for each token of the source the position in `tags` of its
            word's tag, -100 for others. A word that does not stand in the text as it is (the two of a contraction
            such as "du" for "de le") tags nothing.
    """
    tokens = resolve_tokens(tokenizer, corpus, language_tokens, source_tag)
    max_length = min(max_length, number_of_positions(model) or max_length)
    collate = TranslationCollator(tokenizer, model)
    state = this_process()

    def batches(pair: str, rows: Dataset) -> DataLoader:
        encoded = encode(tokenizer, pair, rows["source"], rows["target"], tokens, source_tag, max_length)
        if tags:
            encoded["token_tags"] = [
                token_tags(tokenizer, ids, row["source"], row["words"], row["word_tags"], tags)
                for ids, row in zip(encoded["input_ids"], rows, strict=True)
            ]
        examples = [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]
        examples.sort(key=lambda example: len(example["input_ids"]) + len(example["labels"]))
        whole = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
        route = pair_argument(model, pair)

        def collate_all(share: list[dict[str, Any]]) -> dict[str, Any]:
            batch: dict[str, Any] = {**collate(share), **route}
            if tags:
                batch["token_tags"] = pad_rows([example["token_tags"] for example in share], IGNORED)
            return batch

        own: Any = whole[state.process_index :: state.num_processes]
        return DataLoader(own, batch_size=None, collate_fn=collate_all)

    return {pair: batches(pair, rows) for pair, rows in corpus.items()}
