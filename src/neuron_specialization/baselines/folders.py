"""What the folders of a comparison hold beside its stages, and who may write there."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..neurons.activations import ACTIVITY
from .methods import IDENTIFIED_BY


@contextmanager
def alone(directory: Path, what: str) -> Iterator[None]:
    """Let one process at a time make what several stages, and so several processes, may ask for."""
    with _lock(directory, what):
        yield


def in_use(directory: Path, what: str) -> bool:
    """Whether a process makes that now, see `alone`."""
    try:
        with _lock(directory, what).acquire(timeout=0):
            return False
    except Timeout:
        return True


def _lock(directory: Path, what: str) -> FileLock:
    locks = directory / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / f"{what}.lock")


def remove_checkpoints(directory: Path) -> None:
    """Remove the checkpoints with optimizer states of a run that is done."""
    for checkpoint in directory.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def seed_folders(directory: str | Path) -> list[Path]:
    """Return the folders of the stages that have begun."""
    return sorted(place for place in Path(directory).glob("*/seed-*/") if seed_of(place) >= 0)


def seed_of(stage: Path) -> int:
    """Return the seed of a stage by its folder's name; -1 where it has none, such as a copy's."""
    number = stage.name.removeprefix("seed-")
    return int(number) if number.isdecimal() else -1


def identification_folder(directory: Path, by: str) -> Path:
    """Return where a comparison keeps what masks are made from."""
    folder = directory / "identification"
    return folder if by == ACTIVITY else folder / by


def identification_seconds(directory: Path, kind: str) -> float:
    """Return how long it took to find what a method's masks are made from; 0 for a method without masks."""
    if kind not in IDENTIFIED_BY:
        return 0.0
    path = identification_folder(directory, IDENTIFIED_BY[kind]) / "results.json"
    return json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.is_file() else 0.0
