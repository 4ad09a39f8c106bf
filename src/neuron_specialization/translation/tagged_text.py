"""Text whose words are tagged, and the tag of every token of it.

There are two ways. Parallel sentences (`load_tagged`, `tagged_batches`) are given to the tokenizer as words: it tells
itself of which word a token is, but punctuation stands apart as it does in no text that the model was trained on.
Running text (`load_tagged_text`, `token_tags`) is tokenized as it is written, as everything else that is recorded; the
words are looked for in it, and what is not found there, such as the two words of a contraction, tags nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..neurons.language_pairs import split_pair
from ..neurons.positions import IGNORED
from .batching import TranslationCollator, pad_rows
from .data_files import read_rows
from .tokenization import language_tags

LENGTHS = ("short", "medium", "long")


@dataclass(frozen=True)
class TaggedSentence:
    """The words of one sentence, and a tag for each."""

    words: list[str]
    tags: list[str]


def load_tagged(
    path: str,
    languages: Sequence[str],
    max_sentences: int | None = None,
    *,
    tags: str = "upos",
) -> dict[str, dict[str, TaggedSentence]]:
    """Return language → name of the sentence → its words and tags, of sentences that every language has.

    Args:
        path: a file per language, with "{lang}" for its code, as .parquet or .jsonl. Its column "tokens" holds the
            lists of words, and "sent_id" names sentences: two with one name are translations of each other.
        languages: codes.
        max_sentences: take at most so many, from the top of the first language's file.
        tags: column of the lists of tags.

    Raises:
        ValueError: if a file or column is missing, words and tags differ in number, or no sentence is in all
            languages.
    """
    found: dict[str, dict[str, TaggedSentence]] = {}
    for code in languages:
        place = path.replace("{lang}", code)
        rows = read_rows(place, True)
        needed = ["tokens", tags, "sent_id"]
        absent = needed if rows is None else [column for column in needed if column not in rows.column_names]
        if rows is None or absent:
            raise ValueError(
                f"{place} is no table with the columns {', '.join(absent)}: lists of words, of tags, and names."
            )
        columns = zip(rows["sent_id"], rows["tokens"], rows[tags], strict=True)
        found[code] = {str(name): TaggedSentence(list(w), list(t)) for name, w, t in columns}
        wrong = [name for name, each in found[code].items() if len(each.words) != len(each.tags)]
        if wrong:
            raise ValueError(f"{place}: {wrong[0]} has another number of words than of tags.")
    common = [name for name in found[languages[0]] if all(name in rows for rows in found.values())]
    common = common[:max_sentences]
    if not common:
        raise ValueError(f"No sentence of {path} is in all of {', '.join(languages)}: their sent_id never agree.")
    return {code: {name: rows[name] for name in common} for code, rows in found.items()}


def by_length(sentences: Mapping[str, TaggedSentence]) -> dict[str, TaggedSentence]:
    """Return the sentences with every word tagged by the length of its sentence: thirds of them by number of words."""
    lengths = [len(each.words) for each in sentences.values()]
    bounds = np.quantile(lengths, [1 / 3, 2 / 3])
    names = [LENGTHS[int(np.searchsorted(bounds, length))] for length in lengths]
    return {
        key: TaggedSentence(each.words, [name] * len(each.words))
        for (key, each), name in zip(sentences.items(), names, strict=True)
    }


def check_fast(tokenizer: Any) -> None:
    """Raise ValueError if a tokenizer does not tell which word a token is of."""
    if not tokenizer.is_fast:
        raise ValueError(f"A {type(tokenizer).__name__} does not tell which word a token is of; use a fast tokenizer.")


def tagged_batches(
    model: Any,
    tokenizer: Any,
    sentences: Mapping[str, Mapping[str, TaggedSentence]],
    language_pairs: Sequence[str],
    tags: Sequence[str],
    language_tokens: Mapping[str, str],
    max_length: int = 128,
    batch_size: int = 64,
) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Return pair → batches with "source_tags" and "target_tags", int64 like `input_ids` and `labels`.

    Every token of a word has the word's tag; special tokens, and words whose tag is not among `tags`, have -100.
    Sentences are the words joined by spaces, so punctuation stands apart.

    Args:
        model: the model that the batches are for.
        tokenizer: a fast tokenizer that adds language tags itself (NLLB, M2M100, mBART).
        sentences: language → name → sentence, as `load_tagged` returns them.
        language_pairs: the pairs.
        tags: names of the tags.
        language_tokens: language code → language token.
        max_length: truncate both sides to this many tokens.
        batch_size: sentence pairs per batch.

    Raises:
        ValueError: if the tokenizer does not tell which word a token is of, or adds no language tags.
    """
    check_fast(tokenizer)
    collate, places = TranslationCollator(tokenizer, model), {tag: i for i, tag in enumerate(tags)}
    batches: dict[str, list[dict[str, torch.Tensor]]] = {}
    for pair in language_pairs:
        sides = split_pair(pair)
        with language_tags(tokenizer, *(language_tokens[code] for code in sides)):
            source, target = (
                _encode(tokenizer, list(sentences[code].values()), places, side, max_length)
                for code, side in zip(sides, ("text", "text_target"), strict=True)
            )
        order = sorted(range(len(source)), key=lambda i: len(source[i][0]) + len(target[i][0]))
        batches[pair] = []
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([{"input_ids": source[i][0], "labels": target[i][0]} for i in chosen])
            batch["source_tags"] = pad_rows([source[i][1] for i in chosen], IGNORED)
            batch["target_tags"] = pad_rows([target[i][1] for i in chosen], IGNORED)
            batches[pair].append(batch)
    return batches


def _encode(
    tokenizer: Any, sentences: list[TaggedSentence], places: Mapping[str, int], side: str, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """Return each sentence's token ids and the places of their tags."""
    options = {"is_split_into_words": True, "truncation": True, "max_length": max_length}
    encoded = tokenizer(**{side: [each.words for each in sentences]}, **options)
    found = []
    for i, sentence in enumerate(sentences):
        owners = encoded.word_ids(i)
        tags = [IGNORED if word is None else places.get(sentence.tags[word], IGNORED) for word in owners]
        found.append((encoded["input_ids"][i], tags))
    return found


def load_tagged_text(path: str, pair: str) -> tuple[dict[str, Dataset], list[str]]:
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


def token_tags(
    tokenizer: Any, ids: list[int], text: str, words: list[str], word_tags: list[str], tags: Sequence[str]
) -> list[int]:
    """Return the tag of each token, by the word that the last character of the token is in.

    Args:
        tokenizer: a fast tokenizer.
        ids: the text's tokens, between language tags and the end of sentence.
        text: the text.
        words: its words, in their order.
        word_tags: as many.
        tags: names of the tags.

    Returns:
        For each of the ids a position in `tags`, -100 where it has none of them.
    """
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
