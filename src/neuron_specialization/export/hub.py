"""Publish an adapter directory on the Hub, with a card that says how it was made and how well it translates."""

import json
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..neurons.adapter_file import CONFIG_NAME, WEIGHTS_NAME
from ..neurons.card import CARD_NAME, CardFacts, describe_adapter
from ..neurons.kept_picture import PICTURE_NAME
from ..neurons.masks import NeuronMasks

_TRAINING = (
    *("max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size"),
    *("temperature", "label_smoothing_factor", "weight_decay", "seed", "bf16", "fp16"),
)


def publish(
    adapter: str | PathLike[str], facts: CardFacts, *, private: bool | None = None, token: str | bool | None = None
) -> str:
    """Upload an adapter directory in one commit, and return its address.

    The card in the directory is rewritten from `facts`, unless it was edited.

    Args:
        adapter: directory that holds an adapter, whose files are checked first.
        facts: what the card says; its `repo_id` is the repository, created if missing.
        private: whether a new repository is private; None for the default of its owner.
        token: see `huggingface_hub.HfApi`.

    Raises:
        ValueError: if the directory holds no adapter, a damaged one, or one whose weights are not safetensors.
    """
    if facts.repo_id is None or facts.repo_id.count("/") != 1:
        raise ValueError(f"Expected a Hub repository such as user/name, got {facts.repo_id!r}.")
    directory = Path(adapter)
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory. Name the adapter directory to publish.")
    NeuronMasks.from_pretrained(directory)  # raises where the files are damaged
    if not (directory / WEIGHTS_NAME).is_file():
        raise ValueError(f"{directory} has no {WEIGHTS_NAME}: save the adapter with safe_serialization=True.")
    describe_adapter(directory, facts)
    api = HfApi(token=token)
    repo_id = api.create_repo(facts.repo_id, private=private, exist_ok=True).repo_id
    files = [CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, PICTURE_NAME]
    return str(api.upload_folder(repo_id=repo_id, folder_path=directory, allow_patterns=files))


def facts_from_results(
    facts: CardFacts,
    scores: str | PathLike[str] | None = None,
    training: str | PathLike[str] | None = None,
    identification: str | PathLike[str] | None = None,
) -> CardFacts:
    """Add the facts in results files.

    Args:
        facts: the other facts.
        scores: `results.json` of `recipes/score.py`.
        training: `run.json` of the run that trained it: of `recipes/specialize.py`, or of a stage of a comparison.
        identification: `results.json` of `recipes/identify.py`.

    Raises:
        ValueError: if a file is not what that recipe writes, or tells of a run that did not finish.
    """
    if scores is not None:
        facts = replace(facts, scores=_read(scores, "score")["directions"])
    if training is not None:
        facts = replace(facts, training=_trained(training))
    if identification is not None:
        facts = replace(facts, identification=_counted(_read(identification, "identify")))
    return facts


def _trained(path: str | PathLike[str]) -> dict[str, Any]:
    try:
        run = json.loads(Path(path).read_text())
        settings, result = run["depends_on"], run["result"]
        told = {"updates": result["updates"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the run.json of a finished training run: {error!r}.") from error
    told |= {name: settings.get(name) for name in _TRAINING if settings.get(name) is not False}
    batches = next((value for name, value in settings.items() if name.startswith("batches per update")), None)
    told |= {"batches per update": batches, "target tokens": result.get("target_tokens")}
    told |= {"trained on": str(settings.get("training data", "")).partition(",")[0]}
    versions = result.get("environment", {})
    told |= {name: versions.get(name) for name in ("device", "torch", "transformers", "peft")}
    return {name: value for name, value in told.items() if value not in (None, "")}


def _counted(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what activations were counted on: the data's name, without its directory, and how much of it."""
    settings = {key: value for part in results["arguments"] for key, value in part.items()}
    tokens = {
        f"{stack} positions per pair": f"{min(of):,} to {max(of):,}" for stack, of in results["tokens"].items() if of
    }
    limit = settings.get("max_sentences")
    sentences = {"sentences per pair, at most": limit} if limit else {}
    padding = {"padding counted too": True} if settings.get("count_padding") else {}
    data = str(settings["validation_file"])
    is_file = "." in Path(data).name or Path(data).is_absolute()  # else the name of a dataset on the Hub
    return {"counted on": Path(data).name if is_file else data, **sentences, **tokens, **padding}


def _read(path: str | PathLike[str], recipe: str) -> dict[str, Any]:
    try:
        results = json.loads(Path(path).read_text())
        author = results.get("recipe")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as results of recipes/{recipe}.py: {error}.") from error
    if author != recipe:
        raise ValueError(f"{path} was written by {author or 'something else'}, expected recipes/{recipe}.py.")
    return results
