"""The active adapter of a model: its config, and the language tokens it knows."""

from typing import Any

from .config import NeuronSpecializationConfig
from .routing import is_routed


def active_config(model: Any) -> Any:
    """Return the config of the model's active adapter of this method, or None."""
    if not is_routed(model):
        return None
    active = model.active_adapters
    configs = [model.peft_config[name] for name in (active() if callable(active) else active)]
    return next((config for config in configs if isinstance(config, NeuronSpecializationConfig)), None)


def known_language_tokens(model: Any, tokenizer: Any) -> dict[str, str]:
    """Return language code → language token of the languages that the model's active adapter knows."""
    config = active_config(model)
    ids = (config.language_token_ids if config is not None else None) or {}
    return {code: tokenizer.convert_ids_to_tokens(int(i)) for code, i in ids.items()}
