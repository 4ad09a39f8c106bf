"""Machine-readable results beside every printed table."""

import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from ..neurons.files import replacing
from .processes import this_process

_VERSIONED = (
    "neuron-specialization", "torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "sacrebleu",
    "ctranslate2",
)  # fmt: skip

_TRAINING_COLUMNS = (
    "updates", "target_tokens", "base_validation_loss", "masked_validation_loss", "best_validation_loss",
    "train_runtime",
)  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]], decimals: int = 2, without: Collection[str] = ()) -> str:
    """Return rows (column → value) as a Markdown table, losses and p-values with four decimals, others with fewer.

    Args:
        rows: need not have the same columns.
        decimals: of numbers other than losses and p-values.
        without: columns to leave out.
    """
    rows = [{column: value for column, value in row.items() if column not in without} for row in rows]
    columns = dict.fromkeys(column for row in rows for column in row)
    in_full = {column for column in columns if "loss" in column or column in ("p", "p_adjusted")}
    formats = {column: f".{4 if column in in_full else decimals}f" for column in columns}
    # a column that also holds words would be printed as it is, with all digits
    mixed = {column for row in rows for column, value in row.items() if isinstance(value, str)}
    shown = [
        {c: format(v, formats[c]) if c in mixed and isinstance(v, float) else v for c, v in row.items()}
        for row in rows
    ]
    return tabulate(shown, headers="keys", tablefmt="github", floatfmt=list(formats.values()))


def check_results(directory: str | Path, name: str = "results.json") -> None:
    """Check that a directory holds no results but this recipe's own, which it may replace.

    Raises:
        ValueError: if the file there was written by another recipe, or by something else.
    """
    path = Path(directory) / name
    if not path.is_file():
        return
    try:
        author = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    except (ValueError, KeyError, TypeError):
        author = "something else"
    if author != _recipe():
        raise ValueError(
            f"{path.parent} already holds {name}, written by {author}, and {_recipe()} would replace it. Choose "
            "another --output_dir, or move that file."
        )


def titled_tables(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return every table under its title (title → rows), with four decimals where the title is of losses."""
    shown = [f"{title}\n\n{table(rows, 4 if 'loss' in title.split('(')[0] else 2)}" for title, rows in tables.items()]
    return "\n\n".join(shown)


def write_results(directory: str | Path, results: Mapping[str, Any], name: str = "results.json") -> Path:
    """Write results with the recipe, the versions and the device that made them, replacing the file atomically.

    Args:
        directory: created if missing.
        results: anything JSON can hold; numbers that it cannot (NaN, infinite) become null.
        name: file name.

    Returns:
        Path of the file.
    """
    path = Path(directory) / name
    written = without_nan({"recipe": _recipe(), **results, "environment": environment()})
    with replacing(path) as partial:
        partial.write_text(json.dumps(written, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return path


def without_nan(value: Any) -> Any:
    """Return a value, of dictionaries and lists, with None in the place of numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def has_scores(directory: str | Path, scored: Mapping[str, Any]) -> bool:
    """Whether the results in a directory hold scores of what is scored now; old ones do not say what they are of.

    Args:
        directory: where `write_results` wrote.
        scored: the test data and how it is scored, as "of" of the "scores" tells it.
    """
    path = Path(directory) / "results.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("scores", {}) if path.is_file() else None
    return found is not None and found.get("of", scored) == scored


def report_training(
    directory: str | Path, metrics: Mapping[str, Any], data: Sequence[Mapping[str, Any]], *arguments: Any
) -> None:
    """Print what a training run measured and write it to `results.json`; only the main process does.

    Args:
        directory: the run's output directory. If the run had finished before, its file is kept.
        metrics: what `fit` returns.
        data: rows of the data check's table.
        *arguments: the dataclasses that the command line was parsed into.
    """
    if not this_process().is_main_process:
        return
    print(table([{name: metrics[name] for name in _TRAINING_COLUMNS if metrics.get(name) is not None}]))
    start = [metrics[name] for name in ("base_validation_loss", "masked_validation_loss") if metrics.get(name)]
    if start and metrics.get("best_validation_loss", 0) > min(start):
        print("The validation loss got worse by training: what is saved is the best of its checkpoints.")
    path = Path(directory) / "results.json"
    if not (metrics["finished_before"] and path.is_file()):
        settings = [each.to_dict() if hasattr(each, "to_dict") else vars(each) for each in arguments]
        write_results(directory, {**metrics, "data": list(data), "arguments": settings})
    print(f"{'kept' if metrics['finished_before'] else 'wrote'} {metrics['saved']} and {path}")


def environment() -> dict[str, str | int | None]:
    """Return the versions that a number depends on (None: not installed), the device, processes and threads."""
    cuda = this_process().device.type == "cuda"
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
    versions = {name: _version(name) for name in _VERSIONED}
    used = {"device": device, "processes": this_process().num_processes, "threads": torch.get_num_threads()}
    return {"python": platform.python_version(), **used, **versions}


def _recipe() -> str:
    return Path(sys.argv[0]).stem


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
