"""Command lines of the recipes: options from a YAML file and from flags, a short help, and errors of one sentence."""

import dataclasses
import difflib
import json
import os
import sys
import time
import traceback
import warnings
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from accelerate.utils import get_int_from_env
from torch.distributed import distributed_c10d
from transformers import HfArgumentParser, TrainingArguments

from .messages import check_positive, in_one_line
from .results import check_results

_PACKAGE = Path(__file__).resolve().parents[1]
_SHOWN_OF_TRAINER = {"output_dir", "max_steps", "per_device_train_batch_size", "eval_steps", "seed"}
_COUNTS = {"batch_size", "num_beams", "sample", "sentences", "max_sentences", "zero_shot_sentences", "max_length"}
_WAIT = 5.0  # seconds
_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")


def run(main: Callable[[], None]) -> None:
    """Run a recipe. An expected error ends it with that error's message on stderr and exit code 1.

    Expected are the errors that this package or the recipe raises itself, and those of the operating system about a
    file. Any other exception keeps its traceback, but for an interruption by the user. Of several processes that fail,
    the first one says why: the others mostly fail because it is gone.
    """
    # of transformers to PEFT, whenever an adapter is loaded
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    try:
        main()
    except Exception as error:
        first = _is_first_to_fail()
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            raise SystemExit(1) from None
        if not first:
            time.sleep(_WAIT)  # launchers end every process once one has ended, also the one that is about to print
        if first or not torch.distributed.is_initialized():
            if not _is_expected(error):
                raise
            start = "\n" if any(name in os.environ for name in _LOCAL_RANK) else ""  # others' bars may stand there
            print(f"{start}Error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        if get_int_from_env(_LOCAL_RANK, 0) == 0:
            print("\nInterrupted. The same command goes on from what was saved.", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def _output_is_closed() -> bool:
    """Whether who reads the output has enough, as `head` does; nothing is then written there any more."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return True
    return False


def _is_first_to_fail() -> bool:
    """Return whether no other process has failed; before processes know each other, whether this one is the main."""
    if not torch.distributed.is_initialized():
        return get_int_from_env(_LOCAL_RANK, 0) == 0
    try:
        return distributed_c10d._get_default_store().add("neuron_specialization/failed", 1) == 1
    except RuntimeError:  # the store ended with the main process, which printed an error of its own
        return False


def _is_expected(error: Exception) -> bool:
    if isinstance(error, OSError) and error.filename is not None:
        return True
    raised = traceback.extract_tb(error.__traceback__)[-1]
    file, recipes = Path(raised.filename).resolve(), Path(sys.argv[0]).resolve().parent
    is_ours = file.is_relative_to(_PACKAGE) or file.is_relative_to(recipes)
    # a ValueError of zip(strict=True) or int() in a file of ours is a bug, not a message to the user
    return (
        is_ours and isinstance(error, ValueError | OSError | ImportError) and (raised.line or "").startswith("raise")
    )


def parse(*types: Any, unused: Collection[str] = (), argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse `--config FILE.yaml` and the command line into dataclasses; the command line wins.

    Args:
        *types: dataclasses, such as DataArguments and Seq2SeqTrainingArguments.
        unused: their fields that the recipe does not use; these keep their defaults, and setting one is an error; and
            so it is with those that a dataclass lists in `NO_EFFECT`.
        argv: the command line, by default that of the process.

    Raises:
        ValueError: if an option or a key of the file is unknown or unused, a value does not fit, or the output
            directory holds the results of another recipe.
    """
    unused = {*unused, *(name for kind in types for name in getattr(kind, "NO_EFFECT", ()))}
    words = list(sys.argv[1:] if argv is None else argv)
    config = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    config.add_argument("--config", action="append", default=[])
    if words[-1:] == ["--config"]:
        raise ValueError("--config expects the path of a YAML file.")
    files, words = config.parse_known_args(words)
    parser = _Parser(types, unused, show_all="--help_all" in words)
    words = [*(word for file in files.config for word in parser.read(Path(file))), *words]
    for word in words:
        if word.startswith("--"):
            parser.check(word.split("=")[0])
    *parsed, _, stray = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if stray:
        raise ValueError(f"Unexpected {' '.join(stray)}: every option starts with its name, such as --config FILE.")
    for each in parsed:
        given = {name: number for name, number in vars(each).items() if name in _COUNTS and number is not None}
        check_positive(**given)
    overwrite = any(getattr(each, "overwrite_output_dir", False) for each in parsed)
    for directory in {each.output_dir for each in parsed if getattr(each, "output_dir", None) and not overwrite}:
        check_results(directory)
    return tuple(parsed)


class _Parser(HfArgumentParser):
    """HfArgumentParser with one group of options per dataclass, those of the Trainer only under --help_all."""

    def __init__(self, types: Sequence[Any], unused: Collection[str], show_all: bool) -> None:
        for kind in types:
            kind._argument_group_name = (kind.__doc__ or kind.__name__).splitlines()[0].rstrip(".")
        super().__init__(
            types,
            allow_abbrev=False,  # an abbreviation would change its meaning with the next option
            add_help=False,
            usage="%(prog)s [--config FILE.yaml] [--option value ...]",
            description=sys.modules["__main__"].__doc__,
            formatter_class=_HelpFormatter,
        )
        self.add_argument("--config", metavar="FILE.yaml", help="Options as `name: value`; flags override them.")
        self.add_argument("--help", "-h", action="help", default=SUPPRESS, help="Show this help.")
        trainer = {name for kind in types if issubclass(kind, TrainingArguments) for name in _inherited(kind)}
        self._lists_all = "--help_all" if trainer else "--help"
        if trainer:
            text = "Show the options of transformers' Trainer too (--bf16, --logging_steps, ...) that work here."
            self.add_argument("--help_all", action="help", default=SUPPRESS, help=text)
        self._known: dict[str, Action] = {}
        for option, action in self._option_string_actions.items():
            if action.dest in unused or (action.dest in trainer and not show_all):
                action.help = SUPPRESS
            if action.dest not in unused:
                self._known[option] = action

    def check(self, option: str) -> Action:
        """Return the action of `--option`, or raise ValueError that names the nearest option."""
        if option not in self._known:
            names = [name for name in self._known if "-" not in name[2:]]
            nearest = difflib.get_close_matches(option.replace("-", "_"), names, n=1, cutoff=0)[0]
            raise ValueError(
                f"{self.prog} has no option {option}; the nearest is {nearest}. {self._lists_all} lists all of them."
            )
        return self._known[option]

    def read(self, path: Path) -> list[str]:
        """Return the words of a configuration file."""
        if not path.is_file():
            raise ValueError(f"There is no configuration file {path}.")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a YAML file: {in_one_line(error)}.") from error
        if not isinstance(values, dict):
            raise ValueError(f"Expected lines such as `language_pairs: [en-de]` in {path}, got {values!r}.")
        words: list[str] = []
        for name, value in values.items():
            option = f"--{name}"
            try:
                action = self.check(option)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            takes_list = action.nargs == "+"
            if name == "config":
                raise ValueError(f"{path} cannot name another file with `config`; give --config twice instead.")
            if value is None or value in ([], {}):
                continue
            is_json = isinstance(value, dict | list) and not takes_list  # the Trainer reads its dictionaries from JSON
            if action.type is str and not is_json and _holds_boolean(value):
                raise ValueError(f"{path}: quote the words of {name}; YAML reads no, on and yes as booleans.")
            if takes_list:
                value = [f"{k}={_joined(v)}" for k, v in value.items()] if isinstance(value, dict) else value
                words += [option, *map(str, value if isinstance(value, list) else [value])]
            else:
                words.append(f"{option}={json.dumps(value) if is_json else value}")
        return words

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage of every option."""
        raise ValueError(f"{self.prog}: {message}.")


def _holds_boolean(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(_holds_boolean(part) for part in [*value, *(value.values() if isinstance(value, dict) else [])])
    return isinstance(value, bool)


def _joined(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _inherited(kind: Any) -> set[str]:
    """Return the Trainer's own options, which the short help leaves out, except those that `kind` redefines."""
    names = {field.name for field in dataclasses.fields(kind)}
    return names - vars(kind).get("__annotations__", {}).keys() - _SHOWN_OF_TRAINER


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Each option once, without its dashed spelling, and without empty defaults."""

    def _format_action_invocation(self, action: Action) -> str:
        value = action.metavar or action.dest.upper()
        if action.choices is not None:
            value = "|".join(map(str, action.choices))
        shown: dict[Any, str] = {None: f" {value}", "+": f" {value} ...", "?": " true|false"}
        return action.option_strings[0] + shown.get(action.nargs, "")

    def _get_help_string(self, action: Action) -> str | None:
        is_empty = action.default is None or action.default in ([], SUPPRESS, dataclasses.MISSING)
        return action.help if is_empty else super()._get_help_string(action)
