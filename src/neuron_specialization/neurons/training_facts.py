"""What a card tells of training, read from the `run.json` of a training run."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

_TRAINING = (
    *("max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size"),
    *("temperature", "label_smoothing_factor", "weight_decay", "seed", "bf16", "fp16"),
)
_VALIDATION = {
    "base_validation_loss": "validation loss of the base",
    "masked_validation_loss": "under the masks, not trained",
    "best_validation_loss": "of what was saved",
}


@contextmanager
def reading_json(path: str | PathLike[str], what: str) -> Iterator[Any]:
    """Yield what a JSON file holds, for its reader to look into within the `with`.

    Args:
        path: the file.
        what: what it is to be, for the message.

    Raises:
        ValueError: naming the file, if it cannot be read or the reader misses something in it.
    """
    try:
        yield json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not {what}: {error!r}.") from error


def training_facts(path: str | PathLike[str]) -> dict[str, Any]:
    """Return the settings of a training run and what came of it, for a card: name → value.

    Raises:
        ValueError: if the file is not the run.json of a finished training run.
    """
    with reading_json(path, "the run.json of a finished training run") as run:
        settings, result = run["depends_on"], run["result"]
        told = {"updates": result["updates"]}
        told |= {name: settings.get(name) for name in _TRAINING if settings.get(name) is not False}
        batches = next((value for name, value in settings.items() if name.startswith("batches per update")), None)
        told |= {"batches per update": batches, "target tokens": result.get("target_tokens")}
        told |= {title: f"{result[key]:.4f}" for key, title in _VALIDATION.items() if result.get(key) is not None}
        told |= {"trained on": str(settings.get("training data", "")).partition(",")[0]}
        versions = result.get("environment", {})
        told |= {name: versions.get(name) for name in ("device", "torch", "transformers", "peft")}
        return {name: value for name, value in told.items() if value not in (None, "")}
