"""Publish an adapter directory on the Hub, with a card that says how it was made and how well it translates."""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..neurons.adapter_file import CONFIG_NAME, WEIGHTS_NAME, digest_of_weights, make_repository
from ..neurons.card import describe_adapter, keep_card_of_hub
from ..neurons.card_sections import SCORE_FACTS, CardFacts, facts_of_stage
from ..neurons.files import CARD_NAME
from ..neurons.kept_picture import PICTURE_NAME
from ..neurons.lora_card import describe_lora, is_lora
from ..neurons.masks import NeuronMasks
from ..neurons.training_facts import reading_json, training_facts

_STAGES = ("compare_methods", "transfer_sequentially", "prune")


def publish(
    adapter: str | PathLike[str], facts: CardFacts, *, private: bool | None = None, token: str | bool | None = None
) -> str:
    """Upload an adapter directory in one commit, and return its address.

    The card in the directory is rewritten from `facts`, unless it was edited, there or on the Hub.

    Args:
        adapter: directory that holds an adapter of this method, whose files are checked first, or a LoRA adapter.
        facts: what the card says; its `repo_id` is the repository, created if missing.
        private: whether a new repository is private; None for the default of its owner.
        token: see `huggingface_hub.HfApi`.

    Raises:
        ValueError: if the directory holds no adapter, a damaged one, or one whose weights are not safetensors; if
            `private` is asked of a repository that exists and is public. Nothing is uploaded then.
    """
    if facts.repo_id is None or facts.repo_id.count("/") != 1:
        raise ValueError(f"Expected a Hub repository such as user/name, got {facts.repo_id!r}.")
    directory = Path(adapter)
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory. Name the adapter directory to publish.")
    if not is_lora(directory):
        NeuronMasks.from_pretrained(directory)  # raises where the files are damaged
    if not (directory / WEIGHTS_NAME).is_file():
        raise ValueError(f"{directory} has no {WEIGHTS_NAME}: save the adapter with safe_serialization=True.")
    api = HfApi(token=token)
    repo_id = make_repository(api, facts.repo_id, private)
    keep_card_of_hub(api, repo_id, directory)
    if not describe(directory, facts):
        warnings.warn(f"The card in {directory} was edited and is published as it is.", stacklevel=2)
    files = [CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, PICTURE_NAME]
    return str(api.upload_folder(repo_id=repo_id, folder_path=directory, allow_patterns=files))


def describe(
    adapter: str | PathLike[str], facts: CardFacts, card_directory: str | PathLike[str] | None = None
) -> bool:
    """Write the card of an adapter of this method or of LoRA; see `describe_adapter` and `describe_lora`."""
    return (describe_lora if is_lora(adapter) else describe_adapter)(adapter, facts, card_directory)


def facts_from_results(
    facts: CardFacts,
    scores: str | PathLike[str] | None = None,
    training: str | PathLike[str] | None = None,
    identification: str | PathLike[str] | None = None,
    adapter: str | PathLike[str] | None = None,
) -> CardFacts:
    """Add the facts in results files.

    Args:
        facts: the other facts.
        scores: `results.json` of `recipes/score.py` or `recipes/continue_pretraining.py`, or `part.json` of a stage of
            `recipes/compare_methods.py`, `recipes/transfer_sequentially.py` or `recipes/prune.py`.
        training: `run.json` of the run that trained it: of `recipes/specialize.py`, or of such a stage.
        identification: `results.json` of `recipes/identify.py`.
        adapter: directory of the adapter, to compare with what the files tell.

    Raises:
        ValueError: if a file is not what that recipe writes, is incomplete, tells of a run that did not finish, or of
            another model than the adapter.
    """
    if scores is not None:
        _check_stage(scores, adapter)
        facts = replace(facts, **_scored(scores, adapter))
    if training is not None:
        _check_stage(training, adapter)
        facts = replace(facts, training=training_facts(training))
    if identification is not None:
        facts = replace(facts, identification=_counted(identification, adapter))
    return facts


def identification_beside(masks: str | PathLike[str]) -> Path | None:
    """Return the results that `recipes/identify.py` wrote beside the masks of a directory, if they are there."""
    path = Path(masks) / "results.json"
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return path if isinstance(written, dict) and written.get("recipe") == "identify" else None


@contextmanager
def _results(path: str | PathLike[str], recipe: str, *others: str) -> Iterator[dict[str, Any]]:
    """Yield the results that a recipe wrote, or one of others."""
    with reading_json(path, f"the complete results.json of recipes/{recipe}.py") as results:
        author = results.get("recipe")
        known = author in (recipe, *others)
        if known:
            yield results
    if not known:
        raise ValueError(f"{path} was written by {author or 'something else'}, expected recipes/{recipe}.py.")


def _check_stage(path: str | PathLike[str], adapter: str | PathLike[str] | None) -> None:
    """Raise ValueError if a file stands beside another trained model than the adapter: a stage keeps both together."""
    if adapter is None:
        return
    beside = Path(path).parent
    trained = beside / "model" if is_lora(beside / "model") else beside / "adapter"
    if trained.is_dir() and digest_of_weights(trained) != digest_of_weights(adapter):
        raise ValueError(f"{path} tells of {trained}, which differs from {adapter}.")
    if not trained.is_dir() and (beside / "model").is_dir():
        raise ValueError(f"{path} tells of {beside / 'model'}, a model without adapter, not of {adapter}.")


def _scored(path: str | PathLike[str], adapter: str | PathLike[str] | None) -> dict[str, Any]:
    """Return the scores of every direction, the data that they are on, the beams, and the language tokens."""
    with _results(path, "score", "continue_pretraining", *_STAGES) as results:
        if results["recipe"] in _STAGES:
            return facts_of_stage(results)
        directions = results.get("scores", results)["directions"]  # of continue_pretraining, beside its training
        scores = {direction: {key: of[key] for key in SCORE_FACTS} for direction, of in directions.items()}
        settings = _settings(results)
        about = {"test_data": _data_name(settings["test_file"]), "num_beams": settings.get("num_beams")}
    if adapter is not None and results["recipe"] == "score":
        scored = results.get("adapter_digest")
        if settings.get("adapter", "") is None or scored not in (None, digest_of_weights(adapter)):
            raise ValueError(
                f"{path} has the scores of {settings.get('adapter') or 'a model without adapter'}, not of {adapter}."
            )
    return {"scores": scores, **about}


def _counted(path: str | PathLike[str], adapter: str | PathLike[str] | None) -> dict[str, Any]:
    """Return what activations were counted on: the data's name, without its directory, and how much of it."""
    with _results(path, "identify") as results:
        settings = _settings(results)
        positions = {stack: f"{min(of):,} to {max(of):,}" for stack, of in results["tokens"].items() if of}
        tokens = {f"{stack} positions per pair": told for stack, told in positions.items()}
        limit = settings.get("max_sentences")
        sentences = {"sentences per pair, at most": limit} if limit else {}
        padding = {"padding counted too": True} if settings.get("count_padding") else {}
        told = {"counted on": _data_name(settings["validation_file"]), **sentences, **tokens, **padding}
        kept, selector = results.get("kept", {}), results.get("selector")
    masks = None if adapter is None else NeuronMasks.from_pretrained(adapter)
    by_pair = masks is not None and set(masks.language_pairs) <= set(masks.routes.encoder_rows)  # not by language
    if masks is not None and by_pair and masks.selector == selector:  # else made from several, or renumbered
        shares = {pair: masks.sparsity(pair) for pair in kept if pair in masks.language_pairs}
        same = {p: all(abs(kept[p].get(n, 2) + s - 1) < 1e-6 for n, s in of.items()) for p, of in shares.items()}
        if not all(same.values()):
            other = ", ".join(pair for pair, is_same in same.items() if not is_same)
            raise ValueError(f"{path} tells of other masks than those of {adapter}, for {other}.")
    return told


def _settings(results: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for part in results["arguments"] for key, value in part.items()}


def _data_name(data: str) -> str:
    """Return a file's name without its directory, or a dataset's on the Hub as it is.

    The directory's own name stays where the file's says nothing, as in "tatoeba/{pair}.parquet".
    """
    path = Path(data)
    if path.name.startswith("{"):
        return "/".join(path.parts[-2:])
    return path.name if "." in path.name or path.is_absolute() or path.exists() else data
