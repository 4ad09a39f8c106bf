"""The card of a LoRA adapter that a comparison trained: PEFT's own kind of adapter, whose card PEFT leaves empty."""

from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .adapter_file import CONFIG_NAME
from .card import is_edited, marked
from .card_sections import CardFacts, base_on_hub, evaluation, example, front_matter, versions
from .files import CARD_NAME, replacing
from .training_facts import reading_json

TEMPLATE = Path(__file__).with_name("lora_card.md.jinja")
_SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules")


def is_lora(directory: str | PathLike[str]) -> bool:
    """Whether a directory holds a LoRA adapter."""
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        return False
    with reading_json(path, "the config of an adapter") as config:
        return config.get("peft_type") == "LORA"


def describe_lora(
    directory: str | PathLike[str], facts: CardFacts, card_directory: str | PathLike[str] | None = None
) -> bool:
    """Write README.md for a LoRA adapter, unless it was edited.

    Args:
        directory: the adapter's directory.
        facts: what its files do not tell, its directions among it: those of `scores`.
        card_directory: where the card goes instead of beside the adapter.

    Returns:
        Whether it was written; an edited card stays as it is.

    Raises:
        ValueError: if the config cannot be read, or no scores tell the directions.
    """
    if not facts.scores:
        raise ValueError(f"The files of {directory} do not tell its directions. Give --scores, its stage's part.json.")
    path = Path(card_directory or directory) / CARD_NAME
    if is_edited(path):
        return False
    with reading_json(Path(directory) / CONFIG_NAME, "the config of a LoRA adapter") as config:
        text = _render(config, facts, _base(config, Path(directory)))
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return True


def _base(config: dict[str, Any], directory: Path) -> str | None:
    """Return the base if it is one of the Hub: none that is a folder, seen from here or from around the adapter."""
    base = base_on_hub(config)
    beside = base is not None and any((parent / base).exists() for parent in directory.resolve().parents)
    return None if beside else base


def _render(config: dict[str, Any], facts: CardFacts, base: str | None) -> str:
    pairs, layers = list(facts.scores), config["target_modules"]
    if not isinstance(layers, str):  # a pattern; in a list, PEFT may give each layer with its path
        layers = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
    settings = {**config, "target_modules": layers}
    card = ModelCard.from_template(
        front_matter(pairs, base, facts, "lora"),
        template_path=str(TEMPLATE),
        base=base,
        pairs=pairs,
        repo_id=facts.repo_id,
        example=example(pairs, facts),
        lora={name: settings[name] for name in _SETTINGS},
        training=facts.training,
        evaluation=evaluation(facts),
        versions=versions(),
    )
    return marked(card)
