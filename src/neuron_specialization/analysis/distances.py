"""Distances between languages: URIEL's vectors, families and scripts, as tables in this package.

`language_distances.csv` holds cosine distances between the vectors of URIEL (Littell et al., 2017, "URIEL and
lang2vec", CC BY-SA 4.0), computed from the files of the package lang2vec 1.1.2: "genetic" from the path in the family
tree, "geographic" from distances to fixed points on the globe, "syntactic", "phonological" and "inventory" from its
completed typological features. Norwegian Bokmål has no family path there and takes that of Norwegian.
"""

import csv
from collections.abc import Sequence
from functools import cache
from importlib import resources

import numpy as np

KINDS = ("genetic", "geographic", "syntactic", "phonological", "inventory")
_ALIASES = {"zho": "cmn", "ara": "arb", "nor": "nob"}  # macrolanguages, as their standard languages


def language_distances(codes: Sequence[str], kind: str = "genetic") -> np.ndarray:
    """Return the distances between languages: float64 [n, n], symmetric, zero on the diagonal.

    Args:
        codes: languages by ISO 639-1 ("de"), ISO 639-3 ("deu"), or with a script ("deu_Latn").
        kind: one of KINDS.

    Raises:
        ValueError: if the kind is unknown, or a language is not in the table.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
    names = [_languages(code)["iso639_3"] for code in codes]
    table = _distances()
    distances = np.zeros((len(names), len(names)))
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            if a != b:
                distances[i, j] = float(table[frozenset((a, b))][kind])
    return distances


def families(codes: Sequence[str]) -> list[str]:
    """Return the branch that each language belongs to, such as "Germanic"."""
    return [_languages(code)["family"] for code in codes]


def script_distances(codes: Sequence[str]) -> np.ndarray:
    """Return 0 where two languages are written in one script and 1 elsewhere: float64 [n, n]."""
    scripts = np.array([_languages(code)["script"] for code in codes])
    return (scripts[:, None] != scripts).astype(np.float64)


def _languages(code: str) -> dict[str, str]:
    base = code.split("_")[0].lower()
    base = _ALIASES.get(base, base)
    for row in _read("languages.csv"):
        if base in (row["iso639_1"], row["iso639_3"]):
            return row
    known = ", ".join(row["iso639_1"] for row in _read("languages.csv"))
    raise ValueError(
        f"The package's table has no language {code!r}; it has {known}. Give a distance matrix of your own instead, "
        "for example from the package urielplus."
    )


@cache
def _distances() -> dict[frozenset[str], dict[str, str]]:
    return {frozenset((row["a"], row["b"])): row for row in _read("language_distances.csv")}


@cache
def _read(name: str) -> tuple[dict[str, str], ...]:
    with resources.files(__package__).joinpath(name).open(encoding="utf-8") as file:
        return tuple(csv.DictReader(file))
