"""What cards of any adapter have: front matter, an example, scores, and the versions of libraries."""

import importlib.metadata
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .language_pairs import DEFAULT_PAIR, split_pair

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BASE_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")  # models of the Hub's first years have no owner, such as t5-small
_LANGUAGE = re.compile(r"[a-z]{2,3}")
_VERSIONED = ("neuron-specialization", "transformers", "torch")
_METRICS = {"bleu": "BLEU", "chrf++": "chrF++"}

# what `CardFacts.scores` tells of a direction
SCORE_FACTS = ("bleu", "chrf++", "bleu_signature", "chrf++_signature", "sentences")


@dataclass
class CardFacts:
    """What a card tells beyond the adapter's own files.

    Attributes:
        repo_id: Hub id that the adapter will have.
        license: identifier of its license.
        datasets: Hub ids of the data that it was made from.
        sentence: a source sentence for the example; None for an English one, where a pair is from English.
        language_tokens: language code → token, where the adapter does not know them itself.
        identification: what activations were counted on: fact → value.
        training: setting → value.
        scores: direction → "bleu", "chrf++", their "..._signature" and "sentences", as `recipes/score.py` writes them.
        test_data: what `scores` are on: the name of a file, or a dataset's Hub id, also with ":" and a configuration.
        num_beams: beams that they were translated with.
    """

    repo_id: str | None = None
    license: str | None = None
    datasets: list[str] = field(default_factory=list)
    sentence: str | None = None
    language_tokens: Mapping[str, str] = field(default_factory=dict)
    identification: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    test_data: str | None = None
    num_beams: int | None = None


def facts_of_stage(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `part.json` of a stage tells for `CardFacts`: it names no test data, but holds the translations."""
    scores = {}
    for row in part["rows"]:
        direction = row["direction"]
        told = {**row, **part["signatures"][direction], "sentences": len(part["translations"][direction])}
        scores[direction] = {key: told[key] for key in SCORE_FACTS}
    tokens = part.get("language_tokens") or {}
    return {"scores": scores, "num_beams": part.get("num_beams"), "language_tokens": tokens}


def base_on_hub(config: Mapping[str, Any]) -> str | None:
    """Return the base that adapter_config.json names, if it is one of the Hub.

    A base that is a directory is not named: to others it would be no model, and tell the author's folders.
    """
    named = config.get("base_model_name_or_path")
    return named if isinstance(named, str) and _BASE_ID.fullmatch(named) and not Path(named).exists() else None


def front_matter(pairs: Iterable[str], base: str | None, facts: CardFacts, *tags: str) -> ModelCardData:
    """Return the front matter of a card, with further tags; codes that the Hub does not know as languages are left
    out."""
    codes = dict.fromkeys(code.split("_")[0] for p in pairs if p != DEFAULT_PAIR for code in split_pair(p))
    on_hub = _HUB_ID.fullmatch((facts.test_data or "").partition(":")[0])  # a file's name has no slash
    results = [
        EvalResult(
            task_type="translation",
            task_name=f"Translation {direction}",
            dataset_type=on_hub[0] if on_hub else "unknown",
            dataset_name=facts.test_data or "test data",
            dataset_config=direction,
            metric_type="chrf" if key == "chrf++" else key,
            metric_name=name,
            metric_value=round(score[key], 2),
            metric_config=score.get(f"{key}_signature"),
        )
        for direction, score in facts.scores.items()
        for key, name in _METRICS.items()
    ]
    return ModelCardData(
        library_name="peft",
        base_model=base,
        base_model_relation="adapter" if base else None,
        pipeline_tag="translation",
        language=[code for code in codes if _LANGUAGE.fullmatch(code)] or None,
        license=facts.license,
        datasets=facts.datasets or None,
        metrics=["bleu", "chrf"] if results else None,
        tags=["neuron-specialization", *tags, "multilingual", *([f"base_model:adapter:{base}"] if base else [])],
        model_name=(facts.repo_id or "adapter").rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def example(pairs: Sequence[str], facts: CardFacts) -> dict[str, str]:
    """Return what an example translates, as Python prints it: its "pair", "sentence" and language "tokens".

    "replace" says that the tokens are stand-ins, "" where they are known.
    """
    pair = next((pair for pair in pairs if split_pair(pair)[0].partition("_")[0] == "en"), pairs[0])
    codes = split_pair(pair)
    english = codes[0].partition("_")[0] == "en"
    sentence = facts.sentence or ("A dog runs across the grass." if english else f"A sentence in {codes[0]}.")
    known = all(code in facts.language_tokens for code in codes)
    return {
        "pair": json.dumps(pair),
        "sentence": json.dumps(sentence, ensure_ascii=False),
        "tokens": json.dumps({code: facts.language_tokens[code] if known else code for code in codes}),
        "replace": "" if known else "  # replace by the tokenizer's tokens of these languages, such as eng_Latn",
    }


def evaluation(facts: CardFacts) -> str:
    """Return what stands under "Evaluation": the data, scores by direction, and the signatures of each."""
    if not facts.scores:
        return "No scores are given here."
    beams = "" if not facts.num_beams else "greedy" if facts.num_beams == 1 else f"{facts.num_beams} beams"
    lines = []
    if facts.test_data or beams:
        on = f"On `{facts.test_data}`, {beams}" if beams else f"On `{facts.test_data}`"
        lines += [f"{on if facts.test_data else beams.capitalize()}:", ""]
    lines += ["| direction | sentences | BLEU | chrF++ |", "|---|---|---|---|"]
    by_signature: dict[str, list[str]] = {}
    for direction, score in facts.scores.items():
        lines.append(f"| {direction} | {score['sentences']} | {score['bleu']:.2f} | {score['chrf++']:.2f} |")
        for key, name in _METRICS.items():
            by_signature.setdefault(f"{name}: `{score[f'{key}_signature']}`", []).append(direction)
    everywhere = len(facts.scores)
    told = [text if len(of) == everywhere else f"{text} ({', '.join(of)})" for text, of in by_signature.items()]
    return "\n".join([*lines, "", *(f"- {text}" for text in told)])


def versions() -> dict[str, str]:
    """Return the libraries of the environment that a card is written in: name → version."""
    return {"PEFT": importlib.metadata.version("peft")} | {n: importlib.metadata.version(n) for n in _VERSIONED}
