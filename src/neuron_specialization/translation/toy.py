"""Artificial languages whose relations are known, for demonstrations and tests.

Sentences are generated as meanings (who does what to whom, and how) and expressed in every language. Languages of one
family inherit their roots and their word order from a common ancestor, and differ by sound changes and replaced words.
The pivot is related to none of them. Everything depends on the seed only.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

_ONSETS = ("p", "t", "k", "b", "d", "g", "m", "n", "s", "l", "r", "v", "z", "f")
_VOWELS = ("a", "e", "i", "o", "u")
_ORDERS = ("SVO", "SOV", "VSO", "VOS", "OVS", "OSV")
_CLASSES = {"noun": 5, "verb": 3, "adjective": 2, "adverb": 1}  # shares of the roots, in elevenths
PIVOT = "Pv"  # a capital, so that no language token occurs inside a word
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class _Grammar:
    order: str
    adjective_first: bool
    plural: str
    past: str


class ToyLanguages:
    """Families of related languages and a pivot.

    Args:
        families: number of families.
        languages_per_family: languages in each; codes are a family letter and a language letter: "Aa", "Ab", "Ba".
        seed: everything drawn depends on it.
        replaced: share of roots that a language replaces by words of its own.
        roots: number of roots in each language, a multiple of 11. In large lexicons a few words share a form.
    """

    def __init__(
        self,
        families: int = 2,
        languages_per_family: int = 3,
        seed: int = 0,
        replaced: float = 0.15,
        roots: int = 44,
    ) -> None:
        if families < 1 or families > len(_ORDERS) - 1 or languages_per_family < 1 or languages_per_family > 26:
            raise ValueError(f"Expected 1 to {len(_ORDERS) - 1} families of 1 to 26 languages.")
        if not 0 <= replaced <= 1:
            raise ValueError(f"replaced is a share of roots, between 0 and 1; got {replaced}.")
        parts = sum(_CLASSES.values())
        if roots < parts or roots % parts:
            raise ValueError(f"Expected a multiple of {parts} roots (nouns, verbs, adjectives, adverbs), got {roots}.")
        self.seed = seed
        draw = np.random.default_rng([seed, 0])
        self._sizes = {name: share * roots // parts for name, share in _CLASSES.items()}
        self._lexicons = {PIVOT: _new_roots(draw, self._sizes)}
        self._grammars = {PIVOT: _Grammar("SVO", True, "s", "ed")}
        self.family = {PIVOT: PIVOT}
        for f in range(families):
            ancestor = _new_roots(draw, self._sizes)
            order, adjective_first = _ORDERS[f + 1], bool(f % 2)
            for i in range(languages_per_family):
                code = f"{chr(65 + f)}{chr(97 + i)}"
                self.family[code] = chr(65 + f)
                self._lexicons[code] = _descend(ancestor, draw, replaced)
                self._grammars[code] = _Grammar(order, adjective_first, _syllable(draw), _syllable(draw))

    @property
    def languages(self) -> list[str]:
        """Codes of the languages, the pivot first."""
        return list(self._lexicons)

    @property
    def language_pairs(self) -> list[str]:
        """Every direction into and out of the pivot."""
        others = self.languages[1:]
        return [f"{PIVOT}-{code}" for code in others] + [f"{code}-{PIVOT}" for code in others]

    def distance(self, a: str, b: str) -> float:
        """Return the mean normalized edit distance of two languages' roots: 0 if the same, towards 1 if unrelated."""
        roots = zip(self._roots(a), self._roots(b), strict=True)
        return float(np.mean([_edit_distance(x, y) / max(len(x), len(y)) for x, y in roots]))

    def sentences(self, count: int, split: str) -> Dataset:
        """Return `count` sentences in every language, one column per language.

        Sentences of different splits are drawn independently; with the sizes used here few repeat.
        """
        draw = np.random.default_rng([self.seed, 1, *split.encode()])
        meanings = [_meaning(draw, self._sizes) for _ in range(count)]
        return Dataset.from_dict({code: [self._speak(code, m) for m in meanings] for code in self.languages})

    def write(self, directory: Path, sentences: int, held_out: int) -> None:
        """Write train.jsonl, with `sentences` in every language, validation.jsonl and test.jsonl, with `held_out`."""
        for split in SPLITS:
            count = sentences if split == "train" else held_out
            self.sentences(count, split).to_json(directory / f"{split}.jsonl")

    def _roots(self, code: str) -> list[str]:
        return [root for roots in self._lexicons[code].values() for root in roots]

    def _speak(self, code: str, meaning: dict) -> str:
        grammar, lexicon = self._grammars[code], self._lexicons[code]
        parts = {
            "S": _noun_phrase(meaning["subject"], grammar, lexicon),
            "O": _noun_phrase(meaning["object"], grammar, lexicon),
            "V": [lexicon["verb"][meaning["verb"]] + (grammar.past if meaning["past"] else "")],
        }
        words = [word for part in grammar.order for word in parts[part]]
        if meaning["adverb"] is not None:
            words.append(lexicon["adverb"][meaning["adverb"]])
        return " ".join(words)


def _meaning(draw: np.random.Generator, sizes: dict[str, int]) -> dict:
    def thing() -> dict:
        return {
            "noun": int(draw.integers(sizes["noun"])),
            "adjective": int(draw.integers(sizes["adjective"])) if draw.random() < 0.6 else None,
            "plural": bool(draw.random() < 0.4),
        }

    return {
        "subject": thing(),
        "object": thing(),
        "verb": int(draw.integers(sizes["verb"])),
        "past": bool(draw.random() < 0.5),
        "adverb": int(draw.integers(sizes["adverb"])) if draw.random() < 0.4 else None,
    }


def _noun_phrase(thing: dict, grammar: _Grammar, lexicon: dict[str, list[str]]) -> list[str]:
    words = [lexicon["noun"][thing["noun"]] + (grammar.plural if thing["plural"] else "")]
    if thing["adjective"] is not None:
        words.insert(0 if grammar.adjective_first else 1, lexicon["adjective"][thing["adjective"]])
    return words


def _syllable(draw: np.random.Generator) -> str:
    return str(draw.choice(_ONSETS)) + str(draw.choice(_VOWELS))


def _root(draw: np.random.Generator) -> str:
    return "".join(_syllable(draw) for _ in range(draw.integers(2, 4)))


def _new_roots(draw: np.random.Generator, sizes: dict[str, int]) -> dict[str, list[str]]:
    """Return word class → roots, all of them different."""
    drawn: dict[str, None] = {}
    while len(drawn) < sum(sizes.values()):
        drawn[_root(draw)] = None
    roots = iter(drawn)
    return {name: [next(roots) for _ in range(size)] for name, size in sizes.items()}


def _descend(ancestor: dict[str, list[str]], draw: np.random.Generator, replaced: float) -> dict[str, list[str]]:
    """Return an ancestor's roots after two regular sound changes and the replacement of some words."""
    changed = draw.choice(len(_ONSETS), 4, replace=False)
    sounds = str.maketrans({_ONSETS[changed[0]]: _ONSETS[changed[1]], _ONSETS[changed[2]]: _ONSETS[changed[3]]})
    return {
        name: [_root(draw) if draw.random() < replaced else root.translate(sounds) for root in roots]
        for name, roots in ancestor.items()
    }


def _edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]
