"""Read the stages of a comparison."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .folders import identification_seconds, seed_folders, seed_of
from .methods import EQUAL_SECONDS, MethodArguments, parse_method
from .settings import recorded_settings
from .stages import FAILED, PART, SETTINGS
from .trials import TRIAL

_DEFAULTS = vars(MethodArguments())


def collect(directory: str | Path, planned: Iterable[tuple[str, int]] = ()) -> dict[str, Any]:
    """Read the stages that a directory holds, finished or not.

    Args:
        directory: of the comparison.
        planned: (method, seed) of stages that are listed even if they have not begun.

    Returns:
        "rows": one per method, seed and direction; "stages": one per method and seed, with its "status" ("done",
        "failed", "not done", "not begun" or "n of m parts"), its method without a knob's value ("kind"), the "knob"
        whose value it names and the values of all "knobs", and what it took; "trials": one per learning rate or value
        of a knob that was tried; "signatures": pair → signatures; "translations": method → seed → pair → texts.
    """
    directory = Path(directory)
    known = recorded_settings(directory, SETTINGS)
    found: dict[str, Any] = {"rows": [], "stages": [], "trials": [], "signatures": {}, "translations": {}}
    begun = [(place.parent.name, seed_of(place)) for place in seed_folders(directory)]
    for method, seed in sorted({*begun, *planned}):
        place = directory / method / f"seed-{seed}"
        parts = [_read(path) for path in sorted([*place.glob(PART), *place.glob(f"*/{PART}")])]
        found["stages"].append(_stage(directory, place, parts, method, seed, known))
        for part in parts:
            found["rows"] += part["rows"]
            found["signatures"] |= part["signatures"]
            found["translations"].setdefault(method, {}).setdefault(seed, {}).update(part["translations"])
    found["trials"] = [_trial(path) for path in sorted(directory.glob(f"*/trial-*/{TRIAL}"))]
    return found


def _stage(
    directory: Path, place: Path, parts: list[dict[str, Any]], method: str, seed: int, known: dict[str, Any]
) -> dict[str, Any]:
    own = {name: known.get(f"{name} of {method}", known.get(name, value)) for name, value in _DEFAULTS.items()}
    kind, knobs = parse_method(method, MethodArguments(**own))
    stage: dict[str, Any] = {
        "method": method,
        "seed": seed,
        "status": "not done" if place.is_dir() else "not begun",
        "kind": kind,
        "knob": method.partition("=")[0].removeprefix(f"{kind}_") if "=" in method else None,
        "knobs": vars(knobs),
        "identification_seconds": identification_seconds(directory, kind),
        "tuned_as": "fine_tune" if kind in EQUAL_SECONDS else method,
    }
    failed = _read(place / FAILED)
    if failed:
        stage |= {"status": "failed", "error": failed["error"]}
    if parts:
        spent = {key: sum(part["rows"][0][key] for part in parts) for key in ("updates", "seconds")}
        stage |= {**spent, **parts[0]["about"], "environment": parts[0]["environment"]}
        if not failed:
            stage["status"] = "done" if len(parts) == stage["parts"] else f"{len(parts)} of {stage['parts']} parts"
    return stage


def _trial(path: Path) -> dict[str, Any]:
    trial = _read(path)
    losses = trial["validation_loss"]
    diverged = None in losses.values()
    mean = {"validation_loss": None if diverged else sum(losses.values()) / len(losses), "directions": len(losses)}
    tried = {key: trial.get(key) for key in ("learning_rate", "updates")} | {"knobs": trial.get("knobs", {})}
    return {"method": path.parts[-3], **tried, **mean}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
