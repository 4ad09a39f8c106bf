"""Read the stages of a comparison."""

import json
from pathlib import Path
from typing import Any

from .folders import identification_seconds
from .methods import EQUAL_SECONDS, MethodArguments, parse_method
from .stages import FAILED, PART, SETTINGS


def collect(directory: str | Path) -> dict[str, Any]:
    """Read the stages that a directory holds, finished or not.

    Returns:
        "rows": one per method, seed and direction; "stages": one per method and seed, with its "status" ("done",
        "failed", "not done", or "n of m parts"), its method without a knob's value ("kind"), the "knob" whose value it
        names and the values of all "knobs", and what it took; "trials": one per learning rate or value of a knob that
        was tried; "signatures": pair → signatures; "translations": method → seed → pair → texts.
    """
    known = _read(Path(directory) / SETTINGS).get("settings", {})
    defaults = MethodArguments(**{name: known[name] for name in vars(MethodArguments()) if name in known})
    found: dict[str, Any] = {"rows": [], "stages": [], "trials": [], "signatures": {}, "translations": {}}
    for place in sorted(Path(directory).glob("*/seed-*")):
        method, seed = place.parent.name, int(place.name.removeprefix("seed-"))
        parts = [json.loads(path.read_text()) for path in sorted([*place.glob(PART), *place.glob(f"*/{PART}")])]
        failed = place / FAILED
        kind, knobs = parse_method(method, defaults)
        knob = method.partition("=")[0].removeprefix(f"{kind}_") if "=" in method else None
        stage = {
            "method": method,
            "seed": seed,
            "status": "not done",
            "kind": kind,
            "knob": knob,
            "knobs": vars(knobs),
        }
        stage["identification_seconds"] = identification_seconds(Path(directory), kind)
        stage["tuned_as"] = "fine_tune" if kind == EQUAL_SECONDS else method
        if failed.is_file():
            stage |= {"status": "failed", "error": json.loads(failed.read_text())["error"]}
        if parts:
            spent = {key: sum(part["rows"][0][key] for part in parts) for key in ("updates", "seconds")}
            stage |= {**spent, **parts[0]["about"], "environment": parts[0]["environment"]}
            if stage["status"] != "failed":
                stage["status"] = "done" if len(parts) == stage["parts"] else f"{len(parts)} of {stage['parts']} parts"
        found["stages"].append(stage)
        for part in parts:
            found["rows"] += part["rows"]
            found["signatures"] |= part["signatures"]
            found["translations"].setdefault(method, {}).setdefault(seed, {}).update(part["translations"])
    for path in sorted(Path(directory).glob("*/trial-*/trial.json")):
        trial = json.loads(path.read_text())
        losses = trial["validation_loss"]
        mean = {"validation_loss": sum(losses.values()) / len(losses), "directions": len(losses)}
        tried = {key: trial.get(key) for key in ("learning_rate", "updates")} | {"knobs": trial.get("knobs", {})}
        found["trials"].append({"method": path.parts[-3], **tried, **mean})
    return found


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
