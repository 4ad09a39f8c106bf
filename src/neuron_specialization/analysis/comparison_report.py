"""Everything that a comparison reports, from what its stages wrote: tables with their titles, and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .budget import budget_facts
from .comparison import REFERENCE, Rows, headroom, main_table
from .comparison_tables import (
    comparable,
    curves_table,
    group_table,
    interference_table,
    sweep_table,
    usable_rows,
    zero_shot_directions,
    zero_shot_table,
)
from .plots import plot_differences, plot_interference, plot_sweep
from .statistics import paired_bootstrap

MAIN = "Test loss and scores"
_SWEPT = "Knobs, test loss"
_DRAWN = ("ours", "random_overlap", "general_specific")


def comparison_results(
    found: Mapping[str, Any],
    tables: Mapping[str, Any],
    significance: Mapping[str, Any],
    baseline: Mapping[str, int | None] | None,
) -> dict[str, Any]:
    """Return everything that a comparison measured, for its `results.json`.

    Args:
        found: what `collect` returns, and "zero_shot", what `collect_zero_shot` does.
        tables: what `comparison_tables` makes of it.
        significance: what `directions_tested` returns.
        baseline: how long it was trained; see `budget_facts`.

    Returns:
        "facts", every table by its title, what was found but for the translations, "headroom" and "significance".
    """
    kept = {name: value for name, value in found.items() if name != "translations"}
    facts = budget_facts(found["stages"], found["trials"], baseline)
    measured = headroom(usable_rows(found["rows"], found["stages"]))
    return {"facts": facts, **tables, **kept, "headroom": measured, "significance": significance}


def comparison_tables(
    found: Mapping[str, Any],
    significance: Mapping[str, Mapping[str, Any]],
    pivot: str | None,
    tiers: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Return title → rows of every table that there are stages for, in the order of reading.

    Args:
        found: "rows", "stages" and "trials" as `collect` returns, and "zero_shot" as `collect_zero_shot` does.
        significance: what `directions_tested` returns.
        pivot: language of the one-to-many and many-to-one groups.
        tiers: name → languages with as much data.
    """
    rows, stages = usable_rows(found["rows"], found["stages"]), found["stages"]
    methods = {row["method"] for row in rows}
    main = main_table(rows, stages, found["trials"])
    for line in main:
        signs = [r["difference"] > 0 for r in significance.get(line["method"], {}).values() if r["significant"]]
        if line["method"] in significance:
            line["chrF++ better/worse"] = f"{sum(signs)}/{len(signs) - sum(signs)}"
    tables = {"Headroom": headroom(rows)["ceilings"], MAIN: main}
    for title, score in (("loss", "loss"), ("chrF++", "chrf++"), ("BLEU", "bleu")) if pivot or tiers else ():
        tables[f"By group, {title} ({REFERENCE}; of others the difference)"] = group_table(rows, score, pivot, tiers)
    if {REFERENCE, "bilingual"} <= methods:
        tables["Interference, and the share of it that is gone"] = interference_table(rows)
    tables[f"Validation loss while training ({REFERENCE}; of others the difference)"] = curves_table(stages)
    tables[_SWEPT] = sweep_table(rows, stages)
    scored, reasons = found["zero_shot"]["rows"], found["zero_shot"]["not_applicable"]
    tables["Zero-shot directions"] = zero_shot_table(scored, reasons, pivot)
    tables["Zero-shot directions, chrF++"] = zero_shot_directions(scored, pivot)
    return {title: lines for title, lines in tables.items() if lines}


def directions_tested(
    translations: Mapping[str, Mapping[int, Mapping[str, Sequence[str]]]], references: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """Return method → `paired_bootstrap` of its first seed against that of joint fine-tuning, where both have one.

    Args:
        translations: method → seed → direction → texts.
        references: direction → reference translations.
    """
    reference = translations.get(REFERENCE, {}).get(0)
    return {
        method: paired_bootstrap(seeds[0], reference, references)
        for method, seeds in translations.items()
        if reference is not None and method != REFERENCE and 0 in seeds
    }


def draw(rows: Rows, tables: Mapping[str, list[dict[str, Any]]], directory: Path, zero_shot: Rows = ()) -> list[Path]:
    """Draw every figure that there are rows for, as SVG; `zero_shot` are those of `collect_zero_shot`."""
    methods = {row["method"] for row in rows}
    if REFERENCE not in methods or len(methods) < 2:
        return []
    drawn = [plot_differences(rows, directory / "differences.svg")]
    direct = comparable([row for row in zero_shot if row["route"] == "direct"])
    if direct:
        drawn.append(plot_differences(direct, directory / "zero-shot.svg", "chrf++"))
    compared = [name for name in _DRAWN if name in methods]
    if "bilingual" in methods and compared:
        drawn.append(plot_interference(rows, compared, directory / "interference.svg"))
    for knob in dict.fromkeys(line["knob"] for line in tables.get(_SWEPT, [])):
        drawn.append(plot_sweep(rows, tables[_SWEPT], knob, directory / f"sweep-{knob}.svg"))
    return drawn
