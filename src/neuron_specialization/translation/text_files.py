"""Translate text line by line: one line out per line in, written as it is translated, resumed where it stopped."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..neurons.files import replacing
from .processes import on_main_process, this_process
from .translate import translate

_BATCHES_PER_CHUNK = 16  # translated before anything is written: enough for sorting by length to pay


def read_lines(path: str) -> list[str]:
    """Return the lines of a UTF-8 file, or of standard input for "-".

    Only a newline ends a line; other characters that Unicode counts as line ends (form feed, U+0085, U+2028) are text.
    A carriage return before the newline belongs to it.

    Raises:
        ValueError: if the text is not UTF-8.
        OSError: if the file cannot be read.
    """
    return on_main_process(lambda: _read_lines(path))  # standard input reaches one process only


def _read_lines(path: str) -> list[str]:
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} is not UTF-8 text: line {line} holds the byte {data[error.start]:#x}.") from error
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def one_line(text: str) -> str:
    """Return a translation without line ends of any kind, so that it is one line to every reader."""
    return " ".join(text.splitlines())


def translate_lines(
    model: Any, tokenizer: Any, lines: Sequence[str], pair: str, *, done: int = 0, batch_size: int = 32, **options: Any
) -> Iterator[list[str]]:
    """Yield the translations of `lines[done:]`, some hundred lines at a time; several processes share them.

    Lines without text stay empty. A progress bar counts lines on the main process.

    Args:
        model: a seq2seq model, with adapters or without.
        tokenizer: its tokenizer.
        lines: source sentences, the same in every process.
        pair: direction, such as "en-de".
        done: lines to skip because they are translated already.
        batch_size: sentences per batch.
        **options: passed to `translate`.
    """
    process = this_process()
    chunk = _BATCHES_PER_CHUNK * batch_size * process.num_processes
    with tqdm(
        desc=f"translating {pair}",
        total=len(lines),
        initial=done,
        unit=" lines",
        disable=not process.is_main_process,
    ) as bar:
        for start in range(done, len(lines), chunk):
            here = lines[start : start + chunk]
            with process.split_between_processes([i for i, line in enumerate(here) if line.strip()]) as share:
                text, numbers = [here[i] for i in share], [start + i + 1 for i in share]
                shared = {"batch_size": batch_size, "numbers": numbers, "progress": bar}
                own_share = translate(model, tokenizer, text, pair, **shared, **options)
            translations = iter(gather_object(own_share))
            bar.update(start + len(here) - bar.n)  # what other processes translated, and empty lines
            yield [one_line(next(translations)) if line.strip() else "" for line in here]


class LineWriter:
    """A text file that is complete or absent: lines go to FILE.partial, which becomes FILE at the end of a `with`.

    FILE.partial.json records what the lines were made from, so that only the same work continues them. An error leaves
    both, or nothing if no line was written. Every process makes one of these; the main process writes.

    Args:
        path: file to write; its directory is created if missing. "-" is standard output, which cannot resume.
        made_of: what the lines depend on, name → value.

    Attributes:
        done: number of lines that FILE.partial holds already.

    Raises:
        ValueError: if the file exists, or FILE.partial was made of something else.
    """

    def __init__(self, path: str, made_of: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._partial, self._about = Path(f"{self.path}.partial"), Path(f"{self.path}.partial.json")
        self._made_directories: list[Path] = []
        self._file: BinaryIO = sys.stdout.buffer
        self.done = 0 if path == "-" else on_main_process(lambda: self._open(made_of))

    def __enter__(self) -> "LineWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if not this_process().is_main_process or self._file is sys.stdout.buffer:
            return
        self._file.close()
        if kind is None:
            os.replace(self._partial, self.path)
            self._about.unlink()
        elif not self._partial.stat().st_size:
            self._remove()

    def write(self, lines: Sequence[str]) -> None:
        """Append lines and flush them."""
        if this_process().is_main_process:
            self._file.write("".join(f"{line}\n" for line in lines).encode())
            self._file.flush()

    def _open(self, made_of: Mapping[str, Any]) -> int:
        if self.path.exists():
            raise ValueError(f"{self.path} exists already. Delete it, or choose another --output.")
        self._made_directories = [folder for folder in self.path.absolute().parents if not folder.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("ab")
        text = self._partial.read_bytes()
        whole = text.rfind(b"\n") + 1  # the last line may have been cut off
        if whole:
            self._check_same_work(made_of)
        self._file.truncate(whole)
        with replacing(self._about) as partial:
            partial.write_text(json.dumps(made_of, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if done := text.count(b"\n"):
            print(f"{self._partial} holds {done} lines already; continuing after them", file=sys.stderr)
        return done

    def _remove(self) -> None:
        for file in (self._partial, self._about):
            file.unlink()
        with suppress(OSError):  # somebody else may write there by now
            for folder in self._made_directories:
                folder.rmdir()

    def _check_same_work(self, made_of: Mapping[str, Any]) -> None:
        try:
            before = json.loads(self._about.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise ValueError(
                f"{self._partial} exists, but nothing says what it was made of. Delete it to start over."
            ) from None
        now = json.loads(json.dumps(made_of))
        for name in before | now:
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{self._partial} was started with {name}={before.get(name)!r}, but this run has "
                    f"{now.get(name)!r}. Use the same settings to finish it, or delete it to start over."
                )


def line_digest(lines: Sequence[str]) -> str:
    """Return the SHA-256 of lines of text."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def weights_of(location: str | Path | None) -> dict[str, list[int]]:
    """Return the weight files of a local checkpoint or adapter: name → size and time of the last change."""
    files = [] if location is None else sorted(Path(location).glob("*"))
    stats = {file.name: file.stat() for file in files if file.suffix in (".safetensors", ".bin")}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
