"""Zero-shot directions: score the kept models of finished stages on directions that no stage trained.

A model with masks runs x→y under x→pivot's encoder masks and pivot→y's decoder masks; one without runs it as it is.
This is a step of its own after the stages: it reads what they kept and writes `zero_shot.json` beside `part.json`
after each direction, so it can be cut off, and follow at any time, under a later version too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..adapter.routing import is_routed, router_of
from ..neurons.language_pairs import split_pair
from ..translation.arguments import DataArguments, as_mapping
from ..translation.evaluation import SCORES, check_lengths, check_scorers, evaluate, score
from ..translation.off_target import identified, language_identifier, off_target_rate
from ..translation.results import write_results
from ..translation.text_files import line_digest
from ..translation.token_loss import token_losses
from ..translation.translate import translate
from .folders import alone, seed_folders, seed_of
from .stages import PART, Comparison

ZERO_SHOT = "zero_shot.json"
DIRECT, PIVOT = "direct", "pivot"


@dataclass
class ZeroShotArguments:
    """Directions that no stage trains."""

    zero_shot_pairs: list[str] = field(default_factory=list, metadata={"help": "Directions to score, such as de-fr."})
    zero_shot_file: str | None = field(
        default=None, metadata={"help": "Their test data, where it is not in the test file."}
    )
    zero_shot_sentences: int | None = field(default=None, metadata={"help": "Maximum of sentences per direction."})
    pivoted: list[str] = field(
        default_factory=lambda: ["baseline", "fine_tune"],
        metadata={"help": "Methods that also translate in two steps, through the pivot."},
    )
    identifier_codes: list[str] = field(
        default_factory=list, metadata={"help": "code=ISO 639-1 code for the language identifier, where they differ."}
    )


@dataclass
class ZeroShot:
    """What all stages are scored on.

    Attributes:
        comparison: whose stages are scored.
        data: pair → Dataset with columns "source" and "target", for directions that were not trained.
        args: how they are scored.

    Raises:
        ValueError: if a direction was trained, or has a language that was not, a sentence is too long, or there is no
            such method as one that is to go through the pivot.
        ImportError: if the language identifier, or a word segmenter of a target language, is not installed.
    """

    comparison: Comparison
    data: Mapping[str, Dataset]
    args: ZeroShotArguments

    def __post_init__(self) -> None:
        trained = self.comparison.language_pairs
        known = {code for pair in trained for code in split_pair(pair)}
        for pair in self.data:
            if pair in trained or not set(split_pair(pair)) <= known:
                raise ValueError(
                    f"{pair} is no zero-shot direction of this comparison: expected one that is not trained, between "
                    f"the languages {', '.join(sorted(known))}."
                )
        self.comparison.check(self.args.pivoted)
        check_scorers(split_pair(pair)[1] for pair in self.data)
        convention = self.comparison.convention()
        check_lengths(self.comparison.baseline, self.comparison.tokenizer, self.data, **convention, losses=True)
        self._identify = language_identifier(known, as_mapping(self.args.identifier_codes))

    def score(self, method: str, seed: int) -> list[str]:
        """Score a stage in every direction that it was not scored in; an unfinished one is left alone.

        A direction that cannot be scored says why in the file, and is tried again when asked for again.

        Returns:
            What failed, and why; directions that the method has no model or masks for are no failures.
        """
        directory = self.comparison.stage_directory(method, seed)
        if not list(directory.glob(f"**/{PART}")):
            return []
        with alone(self.comparison.directory, f"zero-shot-{method}-seed-{seed}"):
            return self._score(method, seed, directory)

    def _score(self, method: str, seed: int, directory: Path) -> list[str]:
        found = _read(directory)
        stage = line_digest([part.read_text(encoding="utf-8") for part in sorted(directory.glob(f"**/{PART}"))])
        todo = []
        for route in (DIRECT, PIVOT) if method in self.args.pivoted else (DIRECT,):
            for pair, rows in self.data.items():
                made_from = [stage, self.comparison.stage.num_beams, line_digest([*rows["source"], *rows["target"]])]
                made_from += [self.args.identifier_codes] if self.args.identifier_codes else []
                if found.get(route, {}).get(pair, {}).get("made_from") != made_from:
                    todo.append((route, pair, made_from))
        model: Any = None
        through: dict[str, list[str]] = {}
        failed = []
        for route, pair, made_from in todo:
            try:
                model = self.comparison.final_model(method, seed) if model is None else model
                scored = self._direct(model, pair) if route == DIRECT else self._through_pivot(model, pair, through)
                found.setdefault(route, {})[pair] = {**scored, "made_from": made_from}
            except Exception as error:
                reason = str(error) if isinstance(error, ValueError) else f"FAILED: {type(error).__name__}: {error}"
                if not isinstance(error, ValueError):
                    failed.append(f"{method}, seed {seed}, {pair} ({type(error).__name__}: {error})")
                    print(reason, flush=True)
                found.setdefault(route, {})[pair] = {"not_applicable": reason}
            write_results(directory, {"scored": found}, ZERO_SHOT)
        return failed

    def _direct(self, model: Any, pair: str) -> dict[str, Any]:
        rows, comparison = {pair: self.data[pair]}, self.comparison
        if is_routed(model):
            router_of(model).check(pair)
        batch_size = comparison.training.per_device_eval_batch_size
        options = {"batch_size": batch_size, **comparison.convention()}
        loss = token_losses(model, comparison.tokenizer, rows, **options)[pair]
        scored = evaluate(model, comparison.tokenizer, rows, num_beams=comparison.stage.num_beams, **options)
        return self._result(pair, loss, scored["directions"][pair], scored["translations"][pair])

    def _through_pivot(self, model: Any, pair: str, through: dict[str, list[str]]) -> dict[str, Any]:
        """Translate into the pivot and from there; sentences that many directions share are put into it once."""
        comparison, rows = self.comparison, self.data[pair]
        if comparison.pivot is None:
            raise ValueError("The comparison has no pivot.")
        source, target = split_pair(pair)
        if comparison.pivot in (source, target):
            raise ValueError(f"{pair} has the pivot itself as a side.")
        options = {
            "batch_size": comparison.training.per_device_eval_batch_size,
            "num_beams": comparison.stage.num_beams,
            "long_sentences": "truncate",  # a translation into the pivot can be longer than any sentence
            **comparison.convention(),
        }
        key = line_digest([source, *rows["source"]])
        if key not in through:
            into = f"{source}-{comparison.pivot}"
            through[key] = translate(model, comparison.tokenizer, rows["source"], into, **options)
        texts = translate(model, comparison.tokenizer, through[key], f"{comparison.pivot}-{target}", **options)
        return self._result(pair, None, score(texts, list(rows["target"]), target), texts)

    def _result(self, pair: str, loss: float | None, scores: Mapping[str, Any], texts: list[str]) -> dict[str, Any]:
        target = split_pair(pair)[1]
        result: dict[str, Any] = {"loss": loss, **{name: scores[name] for name in SCORES}}
        if self._identify is not None:
            found = identified(texts, self._identify)
            references = identified(list(self.data[pair]["target"]), self._identify)
            result |= {"off_target": off_target_rate(found, target), "identified": found}
            result["off_target_references"] = off_target_rate(references, target)
        signatures = {name: value for name, value in scores.items() if name.endswith("signature")}
        return {"result": result, "signatures": signatures, "translations": texts}


def load_zero_shot(comparison: Comparison, args: ZeroShotArguments, data: DataArguments) -> ZeroShot:
    """Load the test data of directions that are not trained, from the file of the others unless `args` names one."""
    file = args.zero_shot_file or data.test_file
    untrained = replace(data, language_pairs=args.zero_shot_pairs, test_file=file)
    return ZeroShot(comparison, untrained.load("test", max_sentences=args.zero_shot_sentences), args)


def collect_zero_shot(directory: str | Path) -> dict[str, Any]:
    """Read whatever was scored.

    Returns:
        "rows": one per method, seed, direction and route ("direct" or "pivot", whose loss is None), with "off_target",
        the share of translations in another language, where it can be told; "not_applicable": method → why it has no
        rows; "signatures": pair → signatures.
    """
    collected: dict[str, Any] = {"rows": [], "not_applicable": {}, "signatures": {}}
    for path in sorted(place / ZERO_SHOT for place in seed_folders(directory) if (place / ZERO_SHOT).is_file()):
        method, seed = path.parts[-3], seed_of(path.parent)
        for route, of in _read(path.parent).items():
            for pair, scored in of.items():
                if "result" in scored:
                    about = {"method": method, "seed": seed, "direction": pair, "route": route}
                    collected["rows"].append({**about, **scored["result"]})
                    collected["signatures"][pair] = scored["signatures"]
                else:
                    collected["not_applicable"].setdefault(method, scored["not_applicable"])
    return collected


def _read(directory: Path) -> dict[str, dict[str, Any]]:
    """Return route → pair → what was scored."""
    path = directory / ZERO_SHOT
    return json.loads(path.read_text(encoding="utf-8")).get("scored", {}) if path.is_file() else {}
