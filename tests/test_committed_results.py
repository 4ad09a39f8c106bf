"""The results of comparisons that are committed: every table follows from the rows beside it.

`python -m tests.test_committed_results` makes the tables again, after a change to how they are made.
"""

import json
import runpy
from typing import Any

import pytest

from neuron_specialization.analysis.budget import budget_facts
from neuron_specialization.analysis.comparison import headroom
from neuron_specialization.analysis.comparison_report import comparison_tables
from neuron_specialization.analysis.comparison_tables import sizes_table, usable_rows

from .conftest import RECIPES

RESULTS = {str(path.parent.relative_to(RECIPES)): path for path in sorted(RECIPES.glob("results/**/results.json"))}
READ = {name: json.loads(path.read_text()) for name, path in RESULTS.items()}
COMPARISONS = [name for name, results in READ.items() if results.get("recipe") == "compare_methods"]
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


@pytest.mark.parametrize("name", COMPARISONS)
def test_tables_follow_from_the_rows(name):
    kept, made = READ[name], made_again(READ[name])
    differing = [title for title in {**kept, **made} if not close(made.get(title), kept.get(title))]
    assert not differing, f"{differing} of {name}: run python -m tests.test_committed_results"
    assert (RESULTS[name].parent / "tables.md").read_text() == as_text(
        kept["facts"], kept["headroom"], tables_in(kept)
    )


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
