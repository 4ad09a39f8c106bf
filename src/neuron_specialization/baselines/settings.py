"""What the stages of one output directory have in common: written down, so that no others are mixed with them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..translation.results import write_results


def check_settings(
    directory: Path, name: str, settings: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> None:
    """Record what every stage depends on; raise if the directory holds stages that depend on something else.

    Settings that were recorded before and are not asked about now stay recorded.

    Args:
        directory: of the stages.
        name: of the JSON file.
        settings: name → value that JSON can hold.
        defaults: what stages had that were run before a setting existed or was asked about.

    Raises:
        ValueError: if the file says otherwise; it names the settings that differ.
    """
    settings, path = json.loads(json.dumps(settings)), directory / name
    recorded: dict[str, Any] = {}
    if path.is_file():
        recorded = json.loads(path.read_text())["settings"]
        before = {**json.loads(json.dumps(defaults or {})), **recorded}
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            raise ValueError(
                f"{directory} holds stages with other settings ({', '.join(changed)}). Continue with those settings, "
                "or choose another output directory."
            )
    write_results(directory, {"settings": {**recorded, **settings}}, name)
