"""The results of comparisons that are committed: every table follows from the rows beside it.

`python -m tests.test_committed_results` makes the tables again, after a change to how they are made, and the overview
of all comparisons in recipes/results/README.md.
"""

import json
import re
import runpy
from collections.abc import Sequence
from typing import Any

import pytest

from neuron_specialization.analysis.budget import budget_facts
from neuron_specialization.analysis.comparison import headroom
from neuron_specialization.analysis.comparison_report import comparison_tables
from neuron_specialization.analysis.comparison_tables import comparable, sizes_table, usable_rows
from neuron_specialization.analysis.statistics import paired_differences, reference_mean, spread

from .conftest import RECIPES

RESULTS = {str(path.parent.relative_to(RECIPES)): path for path in sorted(RECIPES.glob("results/**/results.json"))}
READ = {name: json.loads(path.read_text()) for name, path in RESULTS.items()}
COMPARISONS = [name for name, results in READ.items() if results.get("recipe") == "compare_methods"]
COMPARED = ("ours", "random_overlap", "ffn_copies", "ffn_copies_per_target")
INDEX = RECIPES / "results" / "README.md"
OVERVIEW = re.compile(r"(?<=<!-- overview -->\n).*?(?=<!-- end -->)", re.DOTALL)
as_text = runpy.run_path(str(RECIPES / "compare_methods.py"))["as_text"]


def tables_in(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of a comparison's results: what `comparison_tables` makes, by titles."""
    return {name: value for name, value in results.items() if name[0].isupper()}


def made_again(results: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a comparison with everything made again that follows from its rows."""
    settings, stages = results["settings"], results["stages"]
    tables = comparison_tables(results, results["significance"], settings["data"]["pivot"], settings["tiers"])
    facts = [results["facts"][0], *budget_facts(stages, results["trials"], None)[1:]]  # the first is of the baseline
    measured = headroom(usable_rows(results["rows"], stages))
    left = {name: value for name, value in results.items() if name in tables or name not in tables_in(results)}
    return {**left, "facts": facts, "headroom": measured, **tables}


def close(made: Any, kept: Any) -> bool:
    """Whether two results are equal but for the last digits of numbers."""
    if isinstance(made, dict) and isinstance(kept, dict):
        return made.keys() == kept.keys() and all(close(value, kept[key]) for key, value in made.items())
    if isinstance(made, list) and isinstance(kept, list):
        return len(made) == len(kept) and all(map(close, made, kept))
    if isinstance(made, float) and isinstance(kept, float):
        return made == pytest.approx(kept, rel=1e-6, nan_ok=True)
    return made == kept


def changes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return chrF++ of fine_tune, and what each method changes, in chrF++ and of the loss, over the seeds of both."""
    cells = [f"{spread(rows, 'fine_tune', 'chrf++')[0]:.2f}" if rows else ""]
    for method in COMPARED:
        if any(row["method"] == method for row in rows):
            chrf, loss = (paired_differences(rows, method, "fine_tune", s)[0].mean() for s in ("chrf++", "loss"))
            cells.append(f"{chrf:+.2f} ({100 * loss / reference_mean(rows, method, 'fine_tune', 'loss'):+.1f} %)")
        else:
            cells.append("")
    return cells


def overview() -> str:
    """Return a Markdown table of the comparisons that trained the masks of the paper beside fine_tune."""
    columns = ["comparison", "directions", "kept", "seeds", "fine_tune", *COMPARED]
    lines = [[*columns, "never trained: off target", *columns[4:]], ["---"] * (6 + len(columns))]
    for name in COMPARISONS:
        rows, stages = usable_rows(READ[name]["rows"], READ[name]["stages"]), READ[name]["stages"]
        seeds = [len({row["seed"] for row in rows if row["method"] == method}) for method in ("fine_tune", *COMPARED)]
        if not all(seeds[:2]):
            continue
        kept = next(stage["kept"] for stage in stages if stage["method"] == "ours" and stage.get("kept") is not None)
        zero = comparable([row for row in READ[name]["zero_shot"]["rows"] if row["route"] == "direct"])
        folder, directions = name.removeprefix("results/"), len({row["direction"] for row in rows})
        line = [f"[{folder}]({folder}/tables.md)", str(directions), f"{kept:.0%}", " ".join(map(str, seeds))]
        astray = f"{spread(zero, 'fine_tune', 'off_target')[0]:.1%}" if zero else ""
        lines.append([*line, *changes(rows), astray, *changes(zero)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@pytest.mark.parametrize("name", COMPARISONS)
def test_tables_follow_from_the_rows(name):
    kept, made = READ[name], made_again(READ[name])
    differing = [title for title in {**kept, **made} if not close(made.get(title), kept.get(title))]
    assert not differing, f"{differing} of {name}: run python -m tests.test_committed_results"
    assert (RESULTS[name].parent / "tables.md").read_text() == as_text(
        kept["facts"], kept["headroom"], tables_in(kept)
    )


def test_the_overview_follows_from_the_rows():
    assert OVERVIEW.findall(INDEX.read_text()) == [overview()], "run python -m tests.test_committed_results"


def test_there_are_comparisons():
    assert len(COMPARISONS) > 20


def test_the_picture_over_sizes_is_of_the_rows_of_each_size():
    ladder = READ["results/tatoeba-ladder"]
    rows: dict[str, list] = {}
    for row in ladder["rows"]:
        rows.setdefault(row["size"], []).append({key: value for key, value in row.items() if key != "size"})
    for size, of in rows.items():
        compared = READ[f"results/tatoeba-ladder/{size}"]
        assert of == usable_rows(compared["rows"], compared["stages"])
    assert close(sizes_table(rows, ["ours", "random_overlap"]), ladder["summary"])


if __name__ == "__main__":
    for each in COMPARISONS:
        results = made_again(READ[each])
        RESULTS[each].write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        printed = as_text(results["facts"], results["headroom"], tables_in(results))
        (RESULTS[each].parent / "tables.md").write_text(printed)
    INDEX.write_text(OVERVIEW.sub(lambda _: overview(), INDEX.read_text()))
