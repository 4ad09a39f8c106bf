"""Distances between languages: URIEL's vectors, families and scripts, as tables in this package.

`language_distances.csv` holds cosine distances between the vectors of URIEL (Littell et al., 2017, "URIEL and
lang2vec", CC BY-SA 4.0), computed from the files of the package lang2vec 1.1.2: "genetic" from the path in the family
tree, "geographic" from distances to fixed points on the globe, "syntactic", "phonological" and "inventory" from its
completed typological features. Norwegian Bokmål has no family path there and takes that of Norwegian. For languages
outside the table there is the package urielplus (`pip install urielplus`), or a table of the user's own.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import combinations
from pathlib import Path

import numpy as np

KINDS = ("genetic", "geographic", "syntactic", "phonological", "inventory")
URIELPLUS = "urielplus:"
_ALIASES = {"zho": "cmn", "ara": "arb", "nor": "nob"}  # macrolanguages, as their standard languages


def load_distances(codes: Sequence[str], source: str) -> np.ndarray:
    """Return the distances between languages from wherever they are kept: float64 [n, n], symmetric.

    Args:
        codes: languages.
        source: one of KINDS, for the table of this package; "urielplus:" and one of KINDS, for that package; or a
            .csv file with the columns a, b (codes, in either order) and distance.

    Raises:
        ValueError: if the source is unknown, or lacks a language or a pair of them.
    """
    if source.endswith(".csv"):
        return _read_distances(codes, Path(source))
    if source.startswith(URIELPLUS):
        return urielplus_distances(codes, source.removeprefix(URIELPLUS))
    return language_distances(codes, source)


def language_distances(codes: Sequence[str], kind: str = "genetic") -> np.ndarray:
    """Return the distances between languages: float64 [n, n], symmetric, zero on the diagonal.

    Args:
        codes: languages by ISO 639-1 ("de"), ISO 639-3 ("deu"), or with a script ("deu_Latn").
        kind: one of KINDS.

    Raises:
        ValueError: if the kind is unknown, or a language is not in the table.
    """
    _check_kind(kind)
    names = [_languages(code)["iso639_3"] for code in codes]
    table = _distances()
    distances = np.zeros((len(names), len(names)))
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            if a != b:
                distances[i, j] = float(table[frozenset((a, b))][kind])
    return distances


def urielplus_distances(codes: Sequence[str], kind: str = "genetic") -> np.ndarray:
    """Return the angular distances of URIEL+ (Khan et al., 2025): float64 [n, n], symmetric, zero on the diagonal.

    Args:
        codes: languages, as for `language_distances`; any language of URIEL+ by ISO 639-3.
        kind: one of KINDS.

    Raises:
        ImportError: if the package urielplus is not installed.
        ValueError: if the kind or a language is unknown, or URIEL+ lacks the features of a pair.
    """
    _check_kind(kind)
    try:
        from urielplus.urielplus import URIELPlus
    except ImportError as error:
        raise ImportError("Distances of URIEL+ need the package urielplus: pip install urielplus.") from error
    names = [_iso639_3(code) for code in codes]
    known = URIELPlus()
    absent = [code for code, name in zip(codes, names, strict=True) if name not in known.langs[0]]
    if absent:
        raise ValueError(f"URIEL+ does not know {', '.join(absent)}; it takes codes of ISO 639-3.")
    distances = np.zeros((len(names), len(names)))
    for i, j in combinations(range(len(names)), 2):
        try:
            distances[i, j] = distances[j, i] = known.new_distance(kind, [names[i], names[j]])
        except ValueError as error:
            raise ValueError(f"URIEL+ has no {kind} distance between {codes[i]} and {codes[j]}: {error}") from error
    return distances


def subword_distances(tokens: Sequence[Iterable[int]]) -> np.ndarray:
    """Return how little languages share of their subwords: float64 [n, n], 0 for the same use and 1 for nothing.

    ½ Σ_v |p_a(v) - p_b(v)| over token ids v (total variation), with p the share of each id in a language's text.

    Args:
        tokens: token ids of each language's text, without special ones.
    """
    texts = [np.fromiter(ids, dtype=np.int64) for ids in tokens]
    size = max(int(ids.max(initial=0)) for ids in texts) + 1
    shares = np.stack([np.bincount(ids, minlength=size) / max(len(ids), 1) for ids in texts])
    from scipy.spatial.distance import pdist, squareform  # an optional dependency, which reports do without

    return squareform(pdist(shares, "cityblock")) / 2


def label_distances(labels: Sequence[str]) -> np.ndarray:
    """Return 0 where two languages have one label, such as a script or a tier of data, and 1 elsewhere: [n, n]."""
    names = np.array(labels)
    return (names[:, None] != names).astype(np.float64)


def families(codes: Sequence[str], known: Mapping[str, str] | None = None) -> list[str]:
    """Return the branch that each language belongs to, such as "Germanic"; of those in `known`, what stands there."""
    return [(known or {}).get(code) or _languages(code)["family"] for code in codes]


def scripts(codes: Sequence[str], known: Mapping[str, str] | None = None) -> list[str]:
    """Return the script that each language is written in; of those in `known`, what stands there."""
    return [(known or {}).get(code) or _languages(code)["script"] for code in codes]


def controlled_distances(
    codes: Sequence[str], known_scripts: Mapping[str, str] | None = None, tiers: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """Return "script" and, with any tiers, "tier" → label distances to control for; none where all have one label.

    Args:
        codes: n languages.
        known_scripts: see `scripts`.
        tiers: code → tier of training data, "none" where it is left out.
    """
    labels = {"script": scripts(codes, known_scripts)}
    if tiers:
        labels["tier"] = [tiers.get(code, "none") for code in codes]
    return {name: label_distances(of) for name, of in labels.items() if len(set(of)) > 1}


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")


def _read_distances(codes: Sequence[str], path: Path) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"There is no table of distances {path}.")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if not {"a", "b", "distance"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} has the columns {reader.fieldnames}; expected a, b and distance.")
        table = {frozenset((row["a"], row["b"])): _number(row, path) for row in reader}
    distances = np.zeros((len(codes), len(codes)))
    for i, j in combinations(range(len(codes)), 2):
        pair = frozenset((codes[i], codes[j]))
        if pair not in table:
            raise ValueError(f"{path} has no distance between {codes[i]} and {codes[j]}.")
        distances[i, j] = distances[j, i] = table[pair]
    return distances


def _number(row: Mapping[str, str], path: Path) -> float:
    try:
        number = float(row["distance"])
    except (TypeError, ValueError):
        number = float("nan")
    if not math.isfinite(number):
        raise ValueError(f"{path} has no number for {row['a']} and {row['b']}: {row['distance']!r}.")
    return number


def _iso639_3(code: str) -> str:
    base = code.split("_")[0].lower()
    return base if len(base) == 3 else _languages(code)["iso639_3"]


def _languages(code: str) -> dict[str, str]:
    base = code.split("_")[0].lower()
    base = _ALIASES.get(base, base)
    for row in _read("languages.csv"):
        if base in (row["iso639_1"], row["iso639_3"]):
            return row
    known = ", ".join(row["iso639_1"] for row in _read("languages.csv"))
    raise ValueError(
        f"The package's table has no language {code!r}; it has {known}. Say its family and script, and name another "
        "source of distances: 'urielplus:genetic', or a .csv file of your own."
    )


@cache
def _distances() -> dict[frozenset[str], dict[str, str]]:
    return {frozenset((row["a"], row["b"])): row for row in _read("language_distances.csv")}


@cache
def _read(name: str) -> tuple[dict[str, str], ...]:
    with resources.files(__package__).joinpath(name).open(encoding="utf-8") as file:
        return tuple(csv.DictReader(file))
