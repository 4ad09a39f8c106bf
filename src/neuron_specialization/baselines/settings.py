"""What the stages of a comparison have in common: written down, so that no others are mixed with them."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..translation.results import without_nan, write_results
from ..translation.runs import decisive_arguments
from ..translation.trainer import SpecializationTrainingArguments
from .folders import alone

# arguments of the Trainer that each stage sets itself, or that change rounding at most
_OWN = (
    *("seed", "data_seed", "learning_rate", "eval_steps", "per_device_eval_batch_size", "full_determinism"),
    *("batch_eval_metrics", "eval_do_concat_batches", "eval_use_gather_object"),
)


@dataclass
class StageArguments:
    """What is compared, and with which budget; the Trainer's `max_steps` is the number of updates of joint methods."""

    methods: list[str] = field(
        default_factory=list,
        metadata={"help": "method=number of seeds, or with a knob's value: ours_k=0.9=1. See the guide."},
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4], metadata={"help": "Tried by each trained method, see trial_share."}
    )
    scratch_learning_rates: list[float] = field(
        default_factory=lambda: [1e-3], metadata={"help": "The same, for models trained from scratch."}
    )
    trial_share: float = field(
        default=1 / 3,
        metadata={"help": "Share of the updates that a trial makes. Short trials favor low learning rates."},
    )
    single_updates: int = field(default=1000, metadata={"help": "Updates of a model or LoRA of one direction."})
    bilingual_updates: int = field(default=5000, metadata={"help": "Updates of a bilingual model from scratch."})
    knobs: list[str] = field(
        default_factory=list, metadata={"help": "Values to try of a method's knobs: ours_k=[0.9, 0.95, 0.98]."}
    )
    tuning_directions: int = field(
        default=2, metadata={"help": "Directions to tune on, for methods with a model per direction."}
    )
    evaluations: int = field(default=5, metadata={"help": "Evaluations in a run, the best of which is kept."})
    num_beams: int = field(default=5, metadata={"help": "Beams on the test set."})


def shared_arguments(training: SpecializationTrainingArguments) -> dict[str, Any]:
    """Return the arguments of the Trainer that every stage shares: name → value."""
    left_out = {*_OWN, *training.NO_EFFECT}
    shared = {name: value for name, value in decisive_arguments(training).items() if name not in left_out}
    return {**shared, "gradient_accumulation_steps": training.gradient_accumulation_steps}


def recorded_settings(directory: Path, name: str) -> dict[str, Any]:
    """Return what `check_settings` recorded in a directory; nothing if there is no such file."""
    path = directory / name
    return json.loads(path.read_text(encoding="utf-8"))["settings"] if path.is_file() else {}


def check_settings(
    directory: Path,
    name: str,
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    free: Collection[str] = (),
) -> None:
    """Record what every stage depends on; raise if the directory holds stages that depend on something else.

    Settings that were recorded before and are not asked about now stay recorded.

    Args:
        directory: of the stages.
        name: of the JSON file.
        settings: name → value that JSON can hold.
        defaults: what stages had that were run before a setting existed. Whatever else was not recorded is as now.
        free: settings that may change, since nothing was trained with those that are recorded.

    Raises:
        ValueError: if the file says otherwise; it names the settings that differ.
    """
    settings, earlier = (without_nan(json.loads(json.dumps(each))) for each in (settings, defaults or {}))

    def merged() -> tuple[dict[str, Any], dict[str, Any]]:
        recorded = without_nan(recorded_settings(directory, name))
        recorded = {key: value for key, value in recorded.items() if key not in free}
        before = {**settings, **earlier, **recorded} if recorded else settings
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            raise ValueError(
                f"{directory} holds stages with other settings ({', '.join(changed)}). Continue with those settings, "
                "or choose another output directory."
            )
        return recorded, {**recorded, **settings}

    recorded, all_settings = merged()
    if all_settings != recorded:  # a directory that is only read stays as it is
        with alone(directory, "settings"):
            write_results(directory, {"settings": merged()[1]}, name)
