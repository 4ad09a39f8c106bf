"""Language pairs, and the route each one takes through the mask rows.

A language pair ("en-de": source first) owns one encoder row and one decoder row. Rows can belong to pairs (the paper's
masks) or to single languages (factorized masks: the encoder row of the source, the decoder row of the target).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DEFAULT_PAIR = "default"
_CODE = re.compile(r"[A-Za-z0-9_]+")


def split_pair(pair: str) -> tuple[str, str]:
    """Split `"en-de"` into `("en", "de")`.

    Raises:
        ValueError: if `pair` is not two codes of letters, digits and underscores joined by one hyphen.
    """
    source, hyphen, target = pair.partition("-") if isinstance(pair, str) else ("", "", "")
    if not hyphen or not _CODE.fullmatch(source) or not _CODE.fullmatch(target):
        raise ValueError(
            f"Expected a language pair such as 'en-de' or 'eng_Latn-deu_Latn' (source first), got {pair!r}."
        )
    return source, target


def check_pairs(pairs: Iterable[str]) -> list[str]:
    """Return `pairs` as a list after checking that each is well formed and none occurs twice.

    Raises:
        ValueError: naming one that is not well formed, or those that are repeated.
    """
    names = list(pairs)
    for name in names:
        if name != DEFAULT_PAIR:
            split_pair(name)
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise ValueError(f"Each language pair may be listed once, but these are repeated: {', '.join(repeated)}.")
    return names


def shorten(names: Sequence[str], most: int = 8) -> str:
    """Return names separated by commas, only the first ones of many."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def check_source_tag(source_tag: str) -> None:
    """Raise ValueError unless `source_tag` names what the tag on the source side stands for."""
    if source_tag not in ("source", "target"):
        raise ValueError(
            f"source_tag says which language the tag on the source side names: 'source' (NLLB, M2M100, mBART) or "
            f"'target' (Marian, MADLAD/T5), got {source_tag!r}."
        )


def check_pivot(pivot: str | None, pairs: Iterable[str]) -> None:
    """Raise ValueError if the pivot, where there is one, is a language of none of the pairs."""
    pairs = list(pairs)
    if pivot is not None and not any(pivot in split_pair(pair) for pair in pairs):
        raise ValueError(f"The pivot {pivot!r} is a language of no direction: {shorten(pairs)}.")


@dataclass
class Routes:
    """Which encoder row and which decoder row each language pair uses.

    Attributes:
        encoder_rows: names of the encoder rows: pairs, or source languages where the masks are factorized.
        decoder_rows: names of the decoder rows: pairs, or target languages where the masks are factorized.
        listed: pair → (encoder row index, decoder row index). Pairs that factorized rows imply are not listed.
        source_tag: what the tag on the source side names, "source" or "target". Where it names the target the encoder
            sees the target, so rows can be neither factorized nor composed.
    """

    encoder_rows: list[str]
    decoder_rows: list[str]
    listed: dict[str, tuple[int, int]] = field(default_factory=dict)
    source_tag: str = "source"

    def __post_init__(self) -> None:
        check_source_tag(self.source_tag)
        check_pairs(self.listed)
        for stack, names in (("encoder", self.encoder_rows), ("decoder", self.decoder_rows)):
            if len(set(names)) < len(names):
                raise ValueError(f"Each {stack} row needs a name of its own, but some of these are repeated: {names}.")
        for pair, (encoder_row, decoder_row) in self.listed.items():
            if not (0 <= encoder_row < len(self.encoder_rows) and 0 <= decoder_row < len(self.decoder_rows)):
                raise ValueError(
                    f"{pair} is routed to encoder row {encoder_row} and decoder row {decoder_row}, but there are "
                    f"{len(self.encoder_rows)} encoder and {len(self.decoder_rows)} decoder rows."
                )
        encoder = {name: i for i, name in enumerate(self.encoder_rows) if _CODE.fullmatch(name)}
        decoder = {name: i for i, name in enumerate(self.decoder_rows) if _CODE.fullmatch(name)}
        self._encoder_languages = encoder if self.source_tag == "source" else {}
        self._decoder_languages = decoder

    @classmethod
    def per_pair(cls, pairs: Iterable[str], source_tag: str = "source") -> "Routes":
        """One encoder and one decoder row for each pair, in the order given."""
        names = check_pairs(pairs)
        return cls(names, list(names), {name: (i, i) for i, name in enumerate(names)}, source_tag)

    @classmethod
    def per_language(cls, sources: list[str], targets: list[str], pairs: Iterable[str]) -> "Routes":
        """One encoder row for each source language and one decoder row for each target language.

        Their cross product leaves out a language with itself, which a model may be trained to copy or to denoise: such
        pairs are listed.
        """
        same = [source for source, target in map(split_pair, pairs) if source == target]
        return cls(sources, targets, {f"{code}-{code}": (sources.index(code), targets.index(code)) for code in same})

    @classmethod
    def from_metadata(cls, values: Mapping[str, Any]) -> "Routes":
        """Rebuild what `metadata` returned.

        Raises:
            ValueError: if a field is missing or of another type, if a pair is listed twice, or if there is not one
                `[encoder row, decoder row]` for each pair.
        """
        for key in ("encoder_rows", "decoder_rows", "language_pairs"):
            names = values.get(key)
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"Expected {key} as a list of names, got {names!r:.80}.")
        pairs, routes = check_pairs(values["language_pairs"]), values.get("routes")
        if (
            not isinstance(routes, list)
            or len(routes) != len(pairs)
            or not all(isinstance(rows, list) and [type(row) for row in rows] == [int, int] for rows in routes)
        ):
            raise ValueError(
                "Expected routes as one [encoder row, decoder row] for each of the "
                f"{len(pairs)} language_pairs, got {routes!r:.80}."
            )
        listed = {pair: (rows[0], rows[1]) for pair, rows in zip(pairs, routes, strict=True)}
        return cls(values["encoder_rows"], values["decoder_rows"], listed, values.get("source_tag", ""))

    def metadata(self) -> dict[str, Any]:
        """Return what adapter_config.json keeps: JSON keys are sorted there, so pairs and their rows are lists."""
        return {
            "encoder_rows": list(self.encoder_rows),
            "decoder_rows": list(self.decoder_rows),
            "language_pairs": list(self.listed),
            "routes": [list(rows) for rows in self.listed.values()],
            "source_tag": self.source_tag,
        }

    @property
    def language_pairs(self) -> list[str]:
        """Every pair that has a route without composing: the listed ones, then those implied by factorized rows.

        A pair's id is its position in this list.
        """
        implied = [
            f"{source}-{target}"
            for source in self._encoder_languages
            for target in self._decoder_languages
            if source != target
        ]
        return [*self.listed, *(pair for pair in implied if pair not in self.listed)]

    def row_names(self, stack: str) -> list[str]:
        """Return the names of one stack's rows."""
        return self.encoder_rows if stack == "encoder" else self.decoder_rows

    def knows(self, pair: str) -> bool:
        """Whether `pair` has a route, composed ones included."""
        try:
            self.route(pair)
        except ValueError:
            return False
        return True

    def route(self, pair: str, pivot: str | None = None) -> tuple[int, int]:
        """Return `pair`'s (encoder row index, decoder row index).

        A pair that is neither listed nor implied is composed as in the paper's zero-shot translation: the encoder row
        of X→pivot with the decoder row of pivot→Y.

        Raises:
            ValueError: if there is no such route, or if several pivots disagree and none was named.
        """
        if pair in self.listed:
            return self.listed[pair]
        if pair == DEFAULT_PAIR:
            raise ValueError(f"There is no language pair {pair!r}. {self.known()}")
        source, target = split_pair(pair)
        if source in self._encoder_languages and target in self._decoder_languages:
            return self._encoder_languages[source], self._decoder_languages[target]
        return self._compose(pair, source, target, pivot)

    def _compose(self, pair: str, source: str, target: str, pivot: str | None) -> tuple[int, int]:
        into = {p.split("-")[1]: rows[0] for p, rows in self.listed.items() if p.startswith(f"{source}-")}
        out_of = {p.split("-")[0]: rows[1] for p, rows in self.listed.items() if p.endswith(f"-{target}")}
        pivots = [language for language in into if language in out_of and pivot in (None, language)]
        pivots = pivots if source != target else []
        if not pivots:
            raise ValueError(f"There is no language pair {pair!r} and no pivot to compose it from. {self.known()}")
        if self.source_tag == "target":
            raise ValueError(
                f"{pair!r} cannot be composed: in this model the source side carries the target's tag (the Marian and "
                "MADLAD/T5 convention), so encoder rows depend on the target. Identify the pair itself."
            )
        routes = {(into[language], out_of[language]) for language in pivots}
        if len(routes) > 1:
            raise ValueError(f"{pair!r} can be composed through several pivots ({', '.join(pivots)}); name one.")
        return routes.pop()

    def known(self) -> str:
        """Return a sentence that lists the pairs, for error messages."""
        return f"Known pairs: {shorten(self.language_pairs, 60)}."
