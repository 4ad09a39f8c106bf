"""Batches of a corpus to record a model on, and the parts of speech of their tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader
from xxhash import xxh3_64_hexdigest

from ..adapter.routing import pair_argument
from ..neurons.base_model import number_of_positions
from ..neurons.positions import IGNORED
from .batching import TranslationCollator, pad_rows
from .data_files import read_rows
from .encoding import vocabulary_of
from .processes import this_process
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
    tokens = resolve_tokens(tokenizer, corpus, language_tokens)
    max_length = min(max_length, number_of_positions(model) or max_length)
    collate = TranslationCollator(tokenizer, model)
    state = this_process()

    def batches(pair: str, rows: Dataset) -> DataLoader:
        encoded = encode(tokenizer, pair, rows["source"], rows["target"], tokens, source_tag, max_length)
        if tags:
            encoded["token_tags"] = [
                _token_tags(tokenizer, ids, row["source"], row["words"], row["word_tags"], tags)
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


def tagged_text(path: str, pair: str) -> tuple[dict[str, Dataset], list[str]]:
    """Read text with parts of speech to record the encoder on, as a corpus for `corpus_batches`, and its tags.

    Args:
        path: a file with columns "text", "tokens" and "upos" (lists), as `data_files.read_rows` takes it.
        pair: under whose name to record it. The text stands for its own translation, which the encoder does not see.

    Raises:
        ValueError: if there is no such file, or a column is missing.
    """
    rows = read_rows(path)
    missing = sorted({"text", "tokens", "upos"} - set([] if rows is None else rows.column_names))
    if rows is None or missing:
        raise ValueError(f"{path} is no file with parts of speech: it lacks {', '.join(missing)}.")
    rows = rows.select_columns(["text", "tokens", "upos"])
    text = rows.rename_columns({"text": "source", "tokens": "words", "upos": "word_tags"})
    tags = sorted({tag for row in text["word_tags"] for tag in row} - {"_"})
    return {pair: text.add_column("target", list(text["source"]))}, tags


def _token_tags(
    tokenizer: Any, ids: list[int], text: str, words: list[str], word_tags: list[str], tags: Sequence[str]
) -> list[int]:
    """Return the tag of each token, by the word that the last character of the token is in."""
    spans = _spans(text, words)
    place = {tag: i for i, tag in enumerate(tags)}
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "return_attention_mask": False}
    plain = tokenizer(text, **options)
    of = [
        next((place.get(tag, IGNORED) for span, tag in zip(spans, word_tags, strict=True) if end - 1 in span), IGNORED)
        for _, end in plain["offset_mapping"]
    ]
    # language tags and the end of sentence stand around the text
    body = plain["input_ids"]
    first = next((start for start in range(len(ids)) if ids[start : start + 1] == body[:1]), 0)
    found = [IGNORED] * first + of
    return (found + [IGNORED] * len(ids))[: len(ids)]


def _spans(text: str, words: list[str]) -> list[range]:
    """Return where each word stands in the text; an empty range for one that does not."""
    spans, start = [], 0
    for word in words:
        found = text.find(word, start)
        # far ahead it is another word of the same form
        if found < 0 or found - start > 12:
            spans.append(range(0))
            continue
        spans.append(range(found, found + len(word)))
        start = found + len(word)
    return spans
