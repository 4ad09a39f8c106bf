"""Write files whole, those of a directory together, and touch no file that is not ours.

Files of a directory are written into a hidden folder inside the target first. Renaming that folder marks it complete;
then its files are moved into place one by one. What an interruption leaves is completed at the next read or write. A
list of the files written stays beside them: only those may be replaced or removed later.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

WRITTEN = ".written_by_neuron_specialization.json"
CARD_NAME = "README.md"
_PARTIAL = ".neuron_specialization_partial"
_COMPLETE = ".neuron_specialization_complete"
# one checkpoint's or adapter's weights, in whatever format and number of files they are written
_WEIGHTS = re.compile(r"(.*/)?(adapter_)?(?:pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


@contextmanager
def atomic_directory(directory: str | PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Write several files into a directory together: yield an empty folder, then move its files into `directory`.

    Files that this package wrote there earlier are replaced, but for a card that its user edited; weights among them
    that would be read in place of the new ones, and translations of an earlier scoring, are removed. All other files
    stay. If the body raises, nothing changes.

    Args:
        directory: where to write; created if missing.
        overwrite: also replace files of the same names that this package did not write.

    Raises:
        ValueError: if `directory` is a file, or holds files of these names that this package did not write.
    """
    target = Path(directory).absolute()
    made = not target.exists()
    fresh = begin_writing(target)
    try:
        yield fresh
        finish_writing(target, overwrite)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if made and target.is_dir() and not any(target.iterdir()):
            target.rmdir()


def begin_writing(target: Path) -> Path:
    """Return a folder inside `target` to write into, for `finish_writing`; `target` is created if missing.

    The folder holds nothing but the cards in `target`, if there are any (of an adapter with a name, one is in the
    folder of that name): who writes cards keeps what its user edited.

    Raises:
        ValueError: if `target` is a file.
    """
    if target.is_file():
        raise ValueError(f"{target} is a file; expected the path of a directory to write.")
    complete_writing(target)
    partial = partial_folder(target)
    shutil.rmtree(partial, ignore_errors=True)  # what a process that was killed left there
    partial.mkdir(parents=True)
    for card in _cards(target):
        if card.parent == Path() or (target / card).with_name("adapter_config.json").is_file():
            (partial / card).parent.mkdir(exist_ok=True)
            shutil.copyfile(target / card, partial / card)
    return partial


def _cards(directory: Path) -> list[Path]:
    """Return the paths of a directory's card and of those in its folders, relative to it."""
    cards = [path for path in (directory / CARD_NAME, *directory.glob(f"*/{CARD_NAME}")) if path.is_file()]
    return [path.relative_to(directory) for path in cards]


def partial_folder(target: Path) -> Path:
    """Return the folder inside `target` that `begin_writing` makes."""
    return target / _PARTIAL


def finish_writing(target: Path, overwrite: bool = False) -> None:
    """Move what was written into the folder that `begin_writing` returned into its place in `target`."""
    partial = partial_folder(target)
    for card in _cards(partial):
        if (target / card).is_file() and (target / card).read_bytes() == (partial / card).read_bytes():
            (partial / card).unlink()  # it stays, whoever wrote it
    files = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
    files = [name for name in files if name != WRITTEN]
    check_replaceable(target, files, overwrite)
    (partial / WRITTEN).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")
    os.rename(partial, target / _COMPLETE)
    complete_writing(target)


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """Write one file whole: yield the path of a file beside it, which takes its place when the body is done.

    The directory is created if missing. If the body raises, nothing changes. Of several processes that write one file
    at a time, the last to be done has its way.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def check_replaceable(target: str | PathLike[str], files: Iterable[str], overwrite: bool = False) -> None:
    """Check that writing files into a directory would replace no file of the user's.

    Args:
        target: the directory.
        files: paths of the files, relative to it.
        overwrite: whether files that this package did not write may be replaced too.

    Raises:
        ValueError: naming those that may not.
    """
    target = Path(target)
    if target.is_file():
        raise ValueError(f"{target} is a file; expected the path of a directory to write.")
    ours = _written(target)
    others = [name for name in files if name not in ours and (target / name).exists()]
    others = [name for name in others if Path(name).name not in _written((target / name).parent)]
    folders = [name for name in others if (target / name).is_dir()]
    if folders or (others and not overwrite):
        raise ValueError(
            f"{target} already holds {', '.join(others[:5])}, which neuron-specialization did not write there. Choose "
            "another directory"
            + (
                "."
                if folders
                else ", or replace these files with overwrite=True (--overwrite_output_dir in recipes that have it)."
            )
        )


def check_not_input(
    directory: str | PathLike[str], *inputs: str | PathLike[str] | None, contents: bool = False
) -> None:
    """Raise ValueError if `directory`, which is about to be written, is one of the inputs; or, with `contents`, holds
    one."""
    target = Path(directory).resolve()
    for location in inputs:
        if location is None or not Path(location).exists():  # it may be a Hub id
            continue
        found = Path(location).resolve()
        if found == target or (contents and target in found.parents):
            raise ValueError(f"{location} is an input, and would be written over. Choose another output directory.")


def remove_written(target: str | PathLike[str]) -> None:
    """Remove the files in a directory that this package wrote, and the directory if nothing else is in it."""
    target = Path(target)
    complete_writing(target)
    for name in _written(target):
        (target / name).unlink(missing_ok=True)
    (target / WRITTEN).unlink(missing_ok=True)
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()


def complete_writing(target: str | PathLike[str]) -> None:
    """Complete a writing that was interrupted while its files were moved into place, if there is one."""
    target = Path(target)
    complete = target / _COMPLETE
    if not complete.is_dir():
        return
    new = _listed(complete / WRITTEN)
    for name in new:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _move(complete / name, target / name)
    families = {_family(name) for name in new} - {None}
    stale = {name for name in _written(target) - new if _family(name) in families}
    for name in stale:
        (target / name).unlink(missing_ok=True)
    # in a file of its own: the list of new files is needed again if this is interrupted too
    (complete / _PARTIAL).write_text(
        json.dumps(sorted((_listed(target / WRITTEN) | new) - stale), indent=1) + "\n", encoding="utf-8"
    )
    _move(complete / _PARTIAL, target / WRITTEN)
    shutil.rmtree(complete, ignore_errors=True)


def _move(source: Path, destination: Path) -> None:
    try:
        os.replace(source, destination)
    except FileNotFoundError:
        if not destination.exists():  # it has not been moved before, by the process that was interrupted
            raise


def _written(target: Path) -> set[str]:
    """Return the files in `target` that this package wrote, PEFT's saving of its adapters included."""
    config = target / "adapter_config.json"
    files = _listed(target / WRITTEN)
    if config.is_file() and '"NEURON_SPECIALIZATION"' in config.read_text(errors="replace", encoding="utf-8"):
        files |= {"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "kept_neurons.svg"}
        card = target / CARD_NAME
        if card.is_file() and "library_name: peft" in card.read_text(errors="replace", encoding="utf-8"):
            files.add(CARD_NAME)
    return files


def _family(name: str) -> tuple[str | None, ...] | None:
    """Return what a file is a part of that is replaced as a whole: a set of weights, or one model's translations."""
    if name.startswith("translations/"):
        return ("translations",)
    match = _WEIGHTS.fullmatch(name)
    return match and match.group(1, 2)


def _listed(path: Path) -> set[str]:
    """Return the names in a list of files written; none that would lead out of its directory."""
    try:
        names = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except ValueError:
        return set()
    return {name for name in names if isinstance(name, str) and not {"..", "/"} & set(Path(name).parts)}
