"""Translations into another language than the one asked for: the usual failure of directions that were not trained."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..neurons.extras import install

Identifier = Callable[[str], str]


def language_identifier(
    languages: Iterable[str], identifier_codes: Mapping[str, str] | None = None
) -> Identifier | None:
    """Return a function text → which of `languages` it is in, by py3langid.

    Args:
        languages: codes of the languages that can occur; no other is ever identified.
        identifier_codes: code → py3langid's (ISO 639-1) code, where they differ, such as {"deu_Latn": "de"}.

    Returns:
        None if py3langid does not know all of the languages, which may be artificial.

    Raises:
        ValueError: if two languages have the same code there.
        ImportError: if py3langid is not installed, and all codes look like those that it knows.
    """
    codes = {code: (identifier_codes or {}).get(code, code) for code in languages}
    if len(set(codes.values())) < len(codes):
        shown = ", ".join(map("=".join, codes.items()))
        raise ValueError(f"The language identifier cannot tell languages of one code apart: {shown}.")
    names = {name: code for code, name in codes.items()}
    if not all(re.fullmatch("[a-z]{2,3}", name) for name in names):
        return None
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ImportError(
            f"Which language a translation is in is told by py3langid: {install('zero-shot')}."
        ) from error
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    if not names.keys() <= set(identifier.labels):
        return None
    identifier.set_languages(list(names))
    return lambda text: names[identifier.classify(text)[0]]


def identified(texts: Sequence[str], identify: Identifier) -> dict[str, int]:
    """Return language → number of texts in it, the most frequent first; "" stands for texts without any."""
    return dict(Counter(identify(text) if text.strip() else "" for text in texts).most_common())


def off_target_rate(found: Mapping[str, int], target_language: str) -> float:
    """Return the share of texts that are not in the target language, from what `identified` returns."""
    return 1 - found.get(target_language, 0) / sum(found.values())
