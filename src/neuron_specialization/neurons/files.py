"""Directories that are written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path


@contextmanager
def atomic_directory(directory: str | PathLike[str]) -> Iterator[Path]:
    """Write a whole directory or nothing: yield an empty sibling, then put it in the place of `directory`.

    An existing directory is replaced. If the body raises, it is left unchanged.
    """
    target = Path(directory).absolute()
    if target.is_file():
        raise ValueError(f"{target} is a file; expected the path of a directory to write.")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        os.chmod(fresh, 0o755)  # mkdtemp makes it private to the user
        yield fresh
        replace_directory(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def replace_directory(fresh: Path, target: Path) -> None:
    """Move `fresh` to `target`, in the place of what stands there."""
    if not target.exists():
        os.replace(fresh, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
    os.replace(target, old / "replaced")
    os.replace(fresh, target)
    shutil.rmtree(old)
