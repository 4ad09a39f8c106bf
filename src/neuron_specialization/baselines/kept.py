"""The models that a comparison kept, to look into."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..neurons.adapter_file import CONFIG_NAME, read_config_file
from ..translation.checkpoints import load_adapted, load_checkpoint
from .methods import EQUAL_SECONDS

WHOLE_MODELS = ("fine_tune", *EQUAL_SECONDS)  # other methods that keep models change the architecture


def kept_places(comparison: str | Path, methods: Sequence[str]) -> list[tuple[str, Path]]:
    """Return the method and the directory of every model that a comparison kept of some methods.

    Args:
        comparison: output directory of `recipes/compare_methods.py`.
        methods: names of methods.

    Raises:
        ValueError: if one keeps none, or adapters without which its weights are the checkpoint's.
    """
    found = []
    for method in methods:
        stages = sorted(Path(comparison).glob(f"{method}/seed-*"))
        places = [stage / kind for stage in stages for kind in ("adapter", "model") if (stage / kind).is_dir()]
        if not places:
            raise ValueError(f"{comparison} keeps no model of {method}; it is no method of that comparison.")
        for place in places:
            is_adapter = place.name == "adapter"
            config = read_config_file(place / CONFIG_NAME) if is_adapter else {}
            if not (config.get("trainable") == "full" if is_adapter else method in WHOLE_MODELS):
                raise ValueError(
                    f"{place} holds more or less than the checkpoint's own weights, trained. Expected methods such as "
                    "fine_tune and ours."
                )
            found.append((method, place))
    return found


def kept_models(kept: Sequence[tuple[str, Path]], location: str) -> Iterator[tuple[str, Any]]:
    """Yield the name and the model of every seed of a comparison's methods.

    Under its masks a model can only be active where they let it, or where its biases are above 0: what is found there
    says little, so the same weights without masks come beside.

    Args:
        kept: what `kept_places` returns.
        location: the checkpoint that all started from.
    """
    for method, place in kept:
        if place.name == "adapter":
            adapted, _ = load_adapted(location, str(place))
            yield f"{method}, under its masks", adapted
            yield f"{method}, masks taken off", adapted.unload()
        else:
            yield method, load_checkpoint(str(place))[0]
