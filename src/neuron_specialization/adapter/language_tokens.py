"""Ids of language tokens: how a model knows which language a row of tokens is in."""

from collections.abc import Mapping
from typing import Any


def language_tokens(tokenizer: Any, tokens: Mapping[str, str]) -> dict[str, int]:
    """Return language code → id of its token.

    Args:
        tokenizer: the model's tokenizer.
        tokens: language code (as in the names of the pairs) → its token in the vocabulary, such as "deu_Latn" (NLLB),
            ">>deu<<" (Marian) or "<2de>" (MADLAD).

    Raises:
        ValueError: if a token is not in the vocabulary, or two languages share one.
    """
    vocabulary = tokenizer.get_vocab()
    absent = [f"{token!r} ({code})" for code, token in tokens.items() if token not in vocabulary]
    if absent:
        known = [token for token in tokenizer.all_special_tokens if token not in tokenizer.special_tokens_map.values()]
        raise ValueError(
            f"Language tokens not in the tokenizer's vocabulary: {', '.join(absent)}. "
            + (
                f"It knows, among others: {', '.join(known[:12])}."
                if known
                else "It seems to have no language tokens."
            )
        )
    ids = {code: int(vocabulary[token]) for code, token in tokens.items()}
    if len(set(ids.values())) < len(ids):
        raise ValueError(f"Two languages share one token: {dict(tokens)}. Each language needs a token of its own.")
    return ids
