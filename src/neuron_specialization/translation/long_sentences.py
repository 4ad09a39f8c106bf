"""Sentences with more tokens than the model has positions: refused, truncated, or translated in pieces."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

LongSentences = Literal["error", "truncate", "split"]
# where to split, the best first: after sentences, after clauses, between words
_BREAKS = [
    re.compile(r"(?<=[.!?…])\s+|(?<=[。！？।॥؟۔])\s*"),
    re.compile(r"(?<=[,;:])\s+|(?<=[，、；：،])\s*"),
    re.compile(r"\s+"),
]
_WITHOUT_SPACES = {"zh", "zho", "cmn", "yue", "ja", "jpn", "th", "tha", "lo", "lao", "km", "khm", "my", "mya"}


def encode_within(
    limit: int | None,
    sentences: Sequence[str],
    encode: Callable[[Sequence[str], int | None], list[list[int]]],
    pair: str,
    long_sentences: LongSentences = "error",
    numbers: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """Encode sentences so that none exceeds the model's positions.

    Args:
        limit: positions of the model; None for a model that has no limit.
        sentences: text.
        encode: encodes texts, truncated to the number of tokens given unless that is None.
        pair: the direction, for errors.
        long_sentences: what to do with sentences of more tokens: "error", "truncate", or "split" into pieces.
        numbers: what errors call each sentence, such as the numbers of their lines; by default 1, 2, 3, ...

    Returns:
        The token ids of each piece of each sentence; sentences that fit have one piece.

    Raises:
        ValueError: for "error", if a sentence is too long.
    """
    if long_sentences not in get_args(LongSentences):
        raise ValueError(f"Expected long_sentences to be error, truncate or split, got {long_sentences!r}.")
    encoded = [[row] for row in encode(sentences, None)]
    long = [] if limit is None else [i for i, (row,) in enumerate(encoded) if len(row) > limit]
    for i in long:
        assert limit is not None
        if long_sentences == "error":
            raise ValueError(
                f"Sentence {numbers[i] if numbers else i + 1} of {pair}, counting every line from 1, has "
                f"{len(encoded[i][0])} tokens, but the model has positions for {limit}: {sentences[i][:60]!r}... Set "
                "long_sentences to 'truncate', or to 'split', which translates it piece by piece."
            )
        if long_sentences == "truncate":
            encoded[i] = encode([sentences[i]], limit)
        else:
            encoded[i] = list(_pieces(sentences[i], limit, encode))
    return encoded


def _pieces(text: str, limit: int, encode: Callable[[Sequence[str], int | None], list[list[int]]]) -> Iterator:
    (row,) = encode([text], None)
    if len(row) <= limit:
        yield row
        return
    if len(text) < 2:
        raise ValueError(f"The model's {limit} positions cannot hold {text!r} and its {len(row) - 1} special tokens.")
    for half in _halves(text):
        yield from _pieces(half, limit, encode)


def _halves(text: str) -> tuple[str, str]:
    """Split a text at the best place nearest to its middle."""
    text = text.strip()
    for pattern in _BREAKS:
        places = [found for found in pattern.finditer(text) if 0 < found.end() < len(text)]
        if places:
            best = min(places, key=lambda found: abs(found.start() + found.end() - len(text)))
            return text[: best.start()], text[best.end() :]
    return text[: len(text) // 2], text[len(text) // 2 :]


def join_pieces(translations: Sequence[str], target_language: str) -> str:
    """Join the translations of one sentence's pieces, with spaces where the language (such as "de") writes them."""
    return ("" if target_language.split("_")[0].lower() in _WITHOUT_SPACES else " ").join(translations)
