"""One self-contained HTML page about masks and results: no network, no code but its own, every value escaped."""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from ..neurons.ffn import STACKS
from ..neurons.files import replacing
from ..neurons.language_pairs import DEFAULT_PAIR
from ..neurons.masks import NeuronMasks
from ..neurons.selector_description import describe_selector
from .agreement import comparable_pairs
from .distances import families
from .report_results import results_sections

SHOWN_PAIRS = 40


def write_report(
    path: str | Path,
    title: str,
    masks: NeuronMasks | None = None,
    results: Iterable[str | Path] = (),
    language_families: Mapping[str, str] | None = None,
) -> Path:
    """Write a report.

    Args:
        path: file to write, such as report.html.
        title: heading of the page.
        masks: masks whose overlap and kept shares are shown; of more than 40 pairs, 40 of them.
        results: directories of recipes' results: their figures (SVG and PNG, also those in `figures`) and the tables
            in `results.json`.
        language_families: language code → family, where the package's table does not know a language.

    Raises:
        ValueError: if there is nothing to show, or a directory of results holds no `results.json`.
    """
    sections = results_sections(results)
    if masks is None and not sections:
        raise ValueError("There is nothing to report: name masks, or directories of results.")
    style, script = (_text(f"report.{kind}") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_csp_hash(style)}'; script-src '{_csp_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    shown = None if masks is None else _describe(masks, language_families or {})
    environment = Environment(autoescape=True, trim_blocks=False)
    environment.filters["shown"] = _shown
    html = environment.from_string(_text("report.html")).render(
        title=title,
        policy=policy,
        style=Markup(style),
        script=Markup(script),
        masks=shown,
        data=Markup(json.dumps(shown).replace("<", "\\u003c")),
        sections=sections,
    )
    with replacing(path) as partial:
        partial.write_text(html, encoding="utf-8")
    return Path(path)


def _describe(masks: NeuronMasks, known: Mapping[str, str]) -> dict[str, Any]:
    """Return what the page shows of masks, as JSON can hold it."""
    pairs = _shown_pairs(masks.language_pairs)
    left_out = len(masks.language_pairs) - len(pairs)
    places = {stack: _compared_places(pairs, stack) for stack in STACKS}
    blocks = []
    for name in masks.rows:
        rows = np.stack([masks.row(pair, name).numpy() for pair in pairs]).astype(np.float64)
        iou = masks.iou_matrix(name, pairs).numpy()
        others = iou[places[masks.stacks[name]]]
        kept = rows.mean(1)
        block = {"name": name, "stack": masks.stacks[name], "neurons": rows.shape[1], "iou": iou.round(3).tolist()}
        block |= {"mean": float(others.mean()) if len(others) else 1.0}
        blocks.append({**block, "kept": float(kept.mean()), "low": float(kept.min()), "high": float(kept.max())})
    note = f"Shown are {len(pairs)} of {len(masks.language_pairs)} pairs." if left_out else ""
    order = {"pairs": pairs, "by_family": _by_family(pairs, known)}
    return {**order, "blocks": blocks, "note": note, "selected_by": describe_selector(masks.selector)}


def _shown_pairs(pairs: list[str]) -> list[str]:
    """Return pairs that a page has room for: of many, as many into the most frequent language as out of it."""
    if len(pairs) <= SHOWN_PAIRS:
        return pairs
    pivot, half = _pivot(pairs), SHOWN_PAIRS // 2
    into = [pair for pair in pairs if pair.partition("-")[2] == pivot]
    out_of = [pair for pair in pairs if pair.partition("-")[0] == pivot]
    first = [*out_of[:half], *into[:half]]
    chosen = {*first, *[pair for pair in pairs if pair not in first][: SHOWN_PAIRS - len(first)]}
    return [pair for pair in pairs if pair in chosen]


def _compared_places(pairs: Sequence[str], stack: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of the pairs that a stack compares (`comparable_pairs`); of none, all of them."""
    found = comparable_pairs([pair for pair in pairs if pair != DEFAULT_PAIR], stack)
    places = [(pairs.index(a), pairs.index(b)) for a, others in found.items() for b in others]
    compared = [(a, b) for a, b in places if a < b]
    if not compared:
        return np.triu_indices(len(pairs), 1)
    rows, columns = np.array(compared).T
    return rows, columns


def _pivot(pairs: Sequence[str]) -> str:
    every = [code for pair in pairs for code in pair.partition("-")[::2]]
    return max(dict.fromkeys(every), key=every.count)


def _by_family(pairs: Sequence[str], known: Mapping[str, str]) -> list[int]:
    """Return the order of pairs by direction and family: out of the most frequent language first, then into it."""
    codes = [pair.partition("-")[::2] for pair in pairs]
    pivot = _pivot(pairs)

    def key(place: int) -> tuple[bool, str, str]:
        source, target = codes[place]
        other = target if source == pivot else source
        return source != pivot, known.get(other) or _family(other), other

    return sorted(range(len(pairs)), key=key)


def _family(code: str) -> str:
    try:
        return families([code])[0]
    except ValueError:  # not in the package's table: after those that are
        return "~"


def _shown(value: Any) -> str:
    """Return a cell's text; what is missing and what is not a number are left blank."""
    if value is None or value != value:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:#.4g}" if 1 <= abs(value) < 1000 else f"{value:.4g}"  # scores line up: 96.10 below 91.42


def _csp_hash(code: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}"


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
