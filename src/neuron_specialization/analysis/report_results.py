"""What a report shows of a directory of results: its figures with captions, and the tables in its `results.json`."""

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]
_MOST_ROWS, _OPEN_ROWS = 400, 20
_FIGURES = {".svg": "image/svg+xml", ".png": "image/png"}
_SETTINGS = ("recipe", "environment", "arguments", "settings", "selector", "selectors", "of")
_DETAILS = ("rows", "stages", "trials", "signatures", "log", "data")  # what the other tables are made from
_CAPTIONS = {
    "agreement": "Agreement of masks identified again, over depth",
    "alive": "Neurons that are alive (the strongest for at least one token) and dead, after each step",
    "attention": "Cross-attention of one sentence",
    "change": "What the last step changed: how far each neuron's tokens moved, against how many it gained or lost",
    "differences": "Test loss of each method minus that of joint fine-tuning; left is better",
    "gradients": "Cosines of the directions' gradients, over depth",
    "interference": "Loss minus that of joint fine-tuning, against the interference measured there",
    "languages": "Similarity (CKA) and retrieval between translations, layer by layer; dotted: misaligned sentences",
    "mass": "Mass of each neuron after the last step, positive above zero and negative below",
    "matrix": "Scores on each pair after each step; the pair just trained is framed",
    "overlap": "Overlap (IoU) of the pairs' neurons, mean over layers",
    "overlap-decoder": "Overlap (IoU) of neurons per layer of the decoder, languages ordered by family",
    "overlap-depth": "Overlap over depth, and its rank correlation with the distance of languages",
    "overlap-encoder": "Overlap (IoU) of neurons per layer of the encoder, languages ordered by family",
    "source_cka": "Similarity (CKA) to the source model, layer by layer; dotted: misaligned sentences",
    "spectra": "Singular values of each type of weight matrix, ratio to the source model",
    "tags": "Share of the neurons' credit by part of speech",
    "tokens": "Top tokens of the neurons with most credit, before and after the last step",
    "transfer": "Accuracy of each model minus that of the source model, by task and language",
    "zero-shot": "chrF++ of each method in directions that were not trained, minus that of joint fine-tuning",
}
_PRUNING = {"forgetting": "Forgetting", "noise-costs": "What noise costs", "quality": "Quality"}


def results_sections(directories: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Return a section for each directory: "id", "title", "recipe", "facts", "figures", "tables" and "environment".

    Raises:
        ValueError: if a directory holds no `results.json`, or one that no recipe writes.
    """
    sections: list[dict[str, Any]] = []
    for directory in map(Path, directories):
        section = _section(directory)
        while any(section["id"] == other["id"] for other in sections):
            section["id"] += f"-{len(sections)}"
        sections.append(section)
    return sections


def _section(directory: Path) -> dict[str, Any]:
    results = _read(directory)
    name = directory.resolve().name
    return {
        "id": re.sub(r"\W+", "-", f"results-{name}").strip("-"),
        "title": name.replace("-", " ").replace("_", " "),
        "recipe": results.get("recipe"),
        "facts": [fact for fact in results.get("facts", []) if isinstance(fact, str)],
        "figures": [_figure(file, results.get("recipe")) for file in _figure_files(directory)],
        "tables": _without_repetition(_tables(results)),
        "environment": ", ".join(f"{key} {value}" for key, value in results.get("environment", {}).items() if value),
    }


def _read(directory: Path) -> dict[str, Any]:
    path = directory / "results.json"
    if not path.is_file():
        raise ValueError(f"{directory} holds no results.json. Name directories that recipes wrote their results into.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is no JSON ({error}).") from error
    if not isinstance(results, dict):
        raise ValueError(f"{path}: expected a JSON object, as recipes write it, got {results!r:.80}.")
    for name, kind, expected in (("environment", dict, "an object"), ("facts", list, "a list")):
        if not isinstance(results.get(name, kind()), kind):
            raise ValueError(f"{path}: expected {name} to be {expected}, got {results[name]!r:.80}.")
    return results


def _figure_files(directory: Path) -> list[Path]:
    files = sorted([*directory.iterdir(), *directory.glob("figures/*")], key=lambda file: file.stem)
    drawn = {file.with_suffix("") for file in files if file.suffix == ".svg"}  # beside it stands the same as .png
    return [f for f in files if f.suffix in _FIGURES and not (f.suffix == ".png" and f.with_suffix("") in drawn)]


def _figure(file: Path, recipe: str | None) -> dict[str, str]:
    data = f"data:{_FIGURES[file.suffix]};base64,{base64.b64encode(file.read_bytes()).decode()}"
    return {"name": _caption(file.stem, recipe), "data": data}


def _caption(stem: str, recipe: str | None) -> str:
    if recipe == "prune":
        found = re.fullmatch(rf"(?:(.+)-)?({'|'.join(_PRUNING)})", stem)
        name, value = found.groups() if found else (stem, "quality")
        return f"{_PRUNING[value]} against the share of neurons pruned" + (f": {name}" if name else "")
    return _CAPTIONS.get(stem) or stem.replace("_", " ")


def _tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tables: summaries first, then those of a value per key, last the details that these are made from."""
    found = [
        (key in _DETAILS, by_key, _table(title, rows, key not in _DETAILS and not (by_key and title != key)))
        for key, value in _measured(results).items()
        for title, rows, by_key in _named(key, value)
    ]
    return [table for _, _, table in sorted(found, key=lambda each: each[:2])]


def _named(title: str, value: Any) -> Iterator[tuple[str, Rows, bool]]:
    """Yield (title, rows, whether the rows were named by keys) of every table in a value, however deep it lies."""
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        yield title, value, False
    elif isinstance(value, dict) and value:
        value = _measured(value)
        alone = {key: each for key, each in value.items() if not isinstance(each, dict | list)}
        if alone:
            yield title, [alone], False
        if value and all(_is_row(row) for row in value.values()):
            yield title, [{"": key, **row} for key, row in value.items()], True
        else:
            for key, each in value.items():
                yield from _named(f"{title}, {key}", each)


def _measured(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a value of results without what tells how they were made."""
    return {key: each for key, each in value.items() if key not in _SETTINGS}


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and not any(isinstance(v, dict | list) for v in value.values())


def _table(title: str, rows: Rows, may_open: bool) -> dict[str, Any]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    plain = [c for c in columns if not any(isinstance(row.get(c), dict | list) for row in rows)]
    shown = [[row.get(column) for column in plain] for row in rows[:_MOST_ROWS]]
    size = f"{len(rows)} row{'s' if len(rows) > 1 else ''}"
    size = size if len(rows) <= _MOST_ROWS else f"first {_MOST_ROWS} of {size}"
    is_open = may_open and len(rows) <= _OPEN_ROWS
    return {"name": title, "size": size, "columns": plain, "rows": shown, "open": is_open}


def _without_repetition(tables: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out a table whose numbers another one shows before it: some results hold a table under two names."""
    seen: list[Any] = []
    kept = []
    for table in tables:
        content = table["columns"], table["rows"]
        if content not in seen:
            kept.append(table)
        seen.append(content)
    return kept
