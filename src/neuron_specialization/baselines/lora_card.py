"""The card of a LoRA adapter that a comparison trained: one of PEFT's own kind, whose cards PEFT leaves empty."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..neurons.adapter_file import CONFIG_NAME
from ..neurons.card import is_edited, marked
from ..neurons.card_sections import CardFacts, base_on_hub, evaluation, front_matter, versions
from ..neurons.files import CARD_NAME
from ..neurons.language_pairs import split_pair
from ..neurons.training_facts import reading_json

TEMPLATE = Path(__file__).with_name("lora_card.md.jinja")
_SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules")


def is_lora(directory: str | PathLike[str]) -> bool:
    """Whether a directory holds a LoRA adapter."""
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        return False
    with reading_json(path, "the config of an adapter") as config:
        return config.get("peft_type") == "LORA"


def describe_lora(directory: str | PathLike[str], facts: CardFacts, card_directory: str | PathLike[str]) -> bool:
    """Write README.md for a LoRA adapter, unless it was edited.

    Args:
        directory: the adapter's directory.
        facts: what its files do not tell, its directions among it: those of `scores`.
        card_directory: where the card goes.

    Returns:
        Whether it was written; an edited card stays as it is.

    Raises:
        ValueError: if the config cannot be read, or no scores tell the directions.
    """
    if not facts.scores:
        raise ValueError(f"The files of {directory} do not tell its directions. Give --scores, its stage's part.json.")
    path = Path(card_directory) / CARD_NAME
    if is_edited(path):
        return False
    with reading_json(Path(directory) / CONFIG_NAME, "the config of a LoRA adapter") as config:
        text = _render(config, facts)
    path.write_text(text, encoding="utf-8")
    return True


def _render(config: dict[str, Any], facts: CardFacts) -> str:
    pairs, base = list(facts.scores), base_on_hub(config)
    codes = dict.fromkeys(split_pair(pairs[0]))
    layers = {name.rpartition(".")[2] for name in config["target_modules"]}  # PEFT may list each with its path
    settings = {**config, "target_modules": ", ".join(sorted(layers))}
    card = ModelCard.from_template(
        front_matter(pairs, base, facts, "lora"),
        template_path=str(TEMPLATE),
        base=base,
        pairs=pairs,
        repo_id=facts.repo_id,
        sentence=json.dumps(facts.sentence, ensure_ascii=False),
        tokens=json.dumps({code: code for code in codes}),
        lora={name: settings[name] for name in _SETTINGS},
        training=facts.training,
        evaluation=evaluation(facts),
        versions=versions(),
    )
    return marked(card)
