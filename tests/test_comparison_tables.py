"""Tables of a comparison by tier, interference, knob and size, and of zero-shot directions, on known rows."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from neuron_specialization.analysis.budget import budget_facts
from neuron_specialization.analysis.comparison_report import comparison_tables, draw
from neuron_specialization.analysis.comparison_tables import (
    comparable,
    curves_table,
    group_table,
    interference_table,
    sizes_table,
    sweep_table,
    usable_rows,
    zero_shot_directions,
    zero_shot_table,
)
from neuron_specialization.analysis.plots import plot_interference_of_sizes
from neuron_specialization.translation.results import table as markdown
from neuron_specialization.translation.results import write_results

from .test_statistics import rows_of, stage


def test_groups_are_differences_from_fine_tuning_by_tier_and_side():
    rows = rows_of("fine_tune", [[1, 2, 3, 4], [1, 2, 3, 4]]) + rows_of("ours", [[0.5, 1.5, 3, 5]] * 2)
    tiers = {"high": ["de"], "low": ["fr"], "none": ["zh"]}
    reference, ours = group_table(rows, "loss", "en", tiers)
    assert reference["method"] == "fine_tune" and reference["all O2M"] == 1.5 and reference["all M2O"] == 3.5
    assert reference["high O2M"] == 1 and reference["high M2O"] == 3 and reference["high Avg"] == 2
    assert ours["low O2M"] == -0.5 and ours["low M2O"] == 1 and ours["low Avg"] == 0.25 and ours["all Avg"] == 0
    assert not any("none" in column for column in reference)
    (line,) = group_table(rows[-4:], "loss", None)
    assert line == {"method": "ours", "all Avg": 2.5}, "absolute where there is nothing to compare with"


def test_the_share_of_interference_that_is_gone():
    rows = rows_of("fine_tune", [[2, 2, 3, 4]]) + rows_of("ours", [[1.5, 2.2, 3, 3.8]])
    rows += rows_of("bilingual", [[1, 2.5, 3, 3]])
    table = {line["direction"]: line for line in interference_table(rows)}
    assert table["en-de"]["ours, %"] == 50 and table["en-de"]["interference, loss"] == 1
    assert "ours, %" not in table["en-fr"] and table["en-fr"]["interference, loss"] == -0.5, "it gains by sharing"
    assert table["all with interference"]["ours, %"] == pytest.approx(100 * (0.5 + 0.2) / 2)


def test_losses_while_training_are_compared_at_equal_updates():
    stages = [stage("fine_tune", seed, validation_losses=[[5, 3 + seed], [10, 2 + seed]]) for seed in (0, 1)]
    stages += [stage("ours", seed, validation_losses=[[5, 4 + seed], [10, 2.5 + seed]]) for seed in (0, 1, 2)]
    stages += [stage("fine_tune_equal_seconds", validation_losses=[[6, 3], [12, 2]]), stage("masks_only")]
    stages += [stage("bilingual", parts=4, validation_losses=[[5, 1], [10, 1]])]
    assert curves_table(stages) == [
        {"method": "fine_tune", "seeds": 2, "after 5": 3.5, "after 10": 2.5},
        {"method": "ours", "seeds": 2, "after 5": 1, "after 10": 0.5},
    ]
    assert not curves_table(stages[2:])


def test_unfinished_seeds_do_not_enter_averages_of_finished_ones():
    rows = rows_of("fine_tune", [[1, 2, 3, 4]] * 2) + rows_of("lora", [[1, 1, 1, 1]])[:3]
    stages = [
        stage("fine_tune"),
        stage("fine_tune", 1, status="failed", error="x"),
        stage("lora", status="3 of 4 parts"),
    ]
    used = usable_rows(rows[:-4] + rows[-3:], stages)
    assert {(row["method"], row["seed"]) for row in used} == {("fine_tune", 0), ("lora", 0)}
    assert group_table(used, "loss", "en")[1]["all O2M"] == -0.5


def swept(method: str, k: float, knob: str | None) -> dict:
    return stage(method, kind="ours", knob=knob, knobs={"k": k, "r": 8}, kept=k / 2)


def test_a_sweep_is_in_the_order_of_its_values(tmp_path):
    rows = rows_of("fine_tune", [[2, 2, 2, 2]]) + rows_of("ours", [[1.5] * 4]) + rows_of("ours_k=0.7", [[1] * 4])
    rows += rows_of("ours_k=0.99", [[1.8] * 4])
    stages = [stage("fine_tune", kind="fine_tune", knob=None, knobs={"k": 0.95}), swept("ours", 0.95, None)]
    stages += [swept("ours_k=0.7", 0.7, "k"), swept("ours_k=0.99", 0.99, "k")]
    table = sweep_table(rows, stages)
    assert [(line["value"], line["Δ loss"]) for line in table] == [
        ("0.7", -1),
        ("0.95", -0.5),
        ("0.99", pytest.approx(-0.2)),
    ]
    better = {"difference": 1.0, "significant": True}
    significance = {"ours": {"a": better, "b": {**better, "difference": -1.0}, "c": {**better, "significant": False}}}
    found = {"rows": rows, "stages": stages, "trials": [], "zero_shot": {"rows": [], "not_applicable": {}}}
    main = {line["method"]: line for line in comparison_tables(found, significance, "en")["Test loss and scores"]}
    assert main["ours"]["chrF++ better/worse"] == "1/1" and "chrF++ better/worse" not in main["fine_tune"]
    assert table[0]["kept, %"] == 35 and {line["method"] for line in table} == {"ours"}
    assert sweep_table(rows, stages[:2]) == [], "one value is no sweep"
    dropped = stage("bilingual_dropout=0.3", kind="bilingual", knob="dropout", knobs={"dropout": 0.3})
    as_in_baseline = stage("bilingual", kind="bilingual", knob=None, knobs={"dropout": None})
    before = stage("bilingual", seed=1, kind="bilingual", knob=None, knobs={})
    scored = [{**row, "method": "bilingual_dropout=0.3"} for row in rows if row["method"] == "ours"]
    lines = sweep_table(rows + scored, [*stages[:1], dropped, as_in_baseline, before])
    assert [line["value"] for line in lines] == ["0.3"], "of the others no value is known"
    found = {"rows": rows, "stages": stages, "trials": [], "zero_shot": {"rows": [], "not_applicable": {}}}
    tables = comparison_tables(found, {}, "en")
    assert "By group, loss" in str(list(tables)) and not any("Zero" in title for title in tables)
    drawn = draw(rows, tables, tmp_path)
    assert [path.name for path in drawn] == ["differences.svg", "interference.svg", "sweep-k.svg"][::2]
    direct = [{**row, "route": "direct", "chrf++": 10 * row["loss"]} for row in rows]
    through_pivot = [{**row, "route": "pivot", "chrf++": 500.0} for row in rows]
    drawn = draw(rows, tables, tmp_path, [*direct, *through_pivot])
    assert drawn[1].name == "zero-shot.svg"
    assert "right is better" in drawn[1].read_text() and "right is better" not in drawn[0].read_text()
    cut_off = [
        *direct,
        *({**row, "seed": 1} for row in direct if row["method"] == "ours" and row["direction"][:2] == "en"),
    ]
    drawn = draw(rows, tables, tmp_path, cut_off)
    assert len(drawn) == 3, "scoring of a second seed that was cut off leaves the figures of what is there"
    compared = comparable(cut_off)
    assert {row["direction"] for row in compared if row["method"] == "ours"} == {"en-de", "en-fr"}
    assert len({row["direction"] for row in compared if row["method"] == "ours_k=0.7"}) == 4
    assert comparable([row for row in direct if row["method"] != "fine_tune"]) == []


def test_what_was_fair_is_said_above_the_tables():
    trials = [{"method": m, "learning_rate": rate} for m in ("fine_tune", "ours") for rate in (1e-4, 1e-3, 1e-2)]
    stages = [stage("fine_tune", learning_rate=1e-3), stage("ours", learning_rate=1e-2)]
    said = budget_facts(stages, trials, {"updates": 400, "max_steps": 900, "patience": 5})
    assert "until 5 validations" in said[0] and "5 (fine_tune, ours)" in said[1] and "edge of the grid" in said[2]
    assert "ours 0.01" in said[2] and "fine_tune" not in said[2] and len(said) == 3
    equal = stage("fine_tune_equal_seconds", learning_rate=1e-3, updates=7, tuned_as="fine_tune")
    said = budget_facts([*stages[:1], equal, stage("lora", learning_rate=1e-3)], trials[:3], None)
    assert "unknown" in said[0] and "7 (fine_tune_equal_seconds)" in said[1] and said[2].endswith("not tuned: lora.")
    for limits in (
        {"updates": 900, "max_steps": 900, "patience": 5},
        {"updates": 9, "max_steps": 9, "patience": None},
    ):
        assert "NOT trained to patience" in budget_facts([], [], limits)[0]
    assert "unequal numbers of trials: fine_tune 3, ours 2" in str(budget_facts(stages, trials[:-1], None))
    of_a_knob = [{"method": "ours", "learning_rate": 1e-2, "knobs": {"k": k}} for k in (0.5, 0.9)]
    assert budget_facts(stages, [*trials[:3], *of_a_knob], None)[-1].endswith("not tuned: ours.")


def scored(
    method: str, losses: list[float | None], chrf: list[float], off: float = 0.5, route="direct", seed=0
) -> list[dict]:
    return [
        {"method": method, "seed": seed, "direction": d, "route": route, "loss": loss, "chrf++": c, "bleu": 1.0,
         "off_target": off, "off_target_references": 0.1}
        for d, loss, c in zip(("de-fr", "fr-de"), losses, chrf, strict=False)
    ]  # fmt: skip


def test_the_zero_shot_table_compares_with_fine_tuning_and_counts_what_improves():
    rows = scored("fine_tune", [4, 5], [10, 20]) + scored("ours", [3, 5.5], [12, 21], off=0.25)
    rows += scored("fine_tune", [None, None], [30, 31], off=0.1, route="pivot")
    table = {line["method"]: line for line in zero_shot_table(rows, {"bilingual": "one each", "ours": "?"}, "en")}
    assert table["ours"]["Δ loss"] == -0.25 and table["ours"]["better in"] == "1/2"
    assert table["ours"]["chrF++ better in"] == "2/2" and table["ours"]["off-target, %"] == 25
    through = table["fine_tune, through en"]
    assert through["chrF++"] == 30.5 and "loss" not in through and through["chrF++ better in"] == "2/2"
    assert table["(references)"]["off-target, %"] == pytest.approx(10) and table["bilingual"]["n/a"] == "one each"
    partial = [*rows, *scored("ours", [3], [12], seed=1)]
    line = next(line for line in zero_shot_table(partial, {}, "en") if line["method"] == "ours")
    assert line["directions"] == 1 and line["seeds"] == 2 and line["chrF++"] == 12, "one seed is still being scored"
    for row in rows:
        del row["off_target"], row["off_target_references"]
    assert {line["off-target, %"] for line in zero_shot_table(rows, {}, "en")} == {"n/a"}
    assert zero_shot_directions(rows, "en")[0] == {
        **{"direction": "de-fr", "fine_tune": 10, "ours": 12},
        "fine_tune, through en": 30,
    }


def test_sizes_are_drawn_side_by_side_with_their_control(tmp_path):
    rows = {}
    for size, gap in (("d32", 1.0), ("d64", 0.1)):
        rows[size] = rows_of("fine_tune", [[2, 2, 2, 2]]) + rows_of("bilingual", [[2 - gap, 2 - gap / 2, 2, 2 - gap]])
        rows[size] += rows_of("ours", [[2 - gap / 2, 2 - gap / 4, 2, 2 - gap / 2]])
    rows["d32"] += rows_of("random_overlap", [[2.1] * 4])
    table = sizes_table(rows, ["ours", "random_overlap"])
    ours = {line["size"]: line for line in table if line["method"] == "ours"}
    assert ours["d32"]["interference, loss"] == pytest.approx(0.625) and ours["d32"]["better in"] == "3/4"
    assert ours["all"]["rank correlation"] == pytest.approx(-1) and ours["all"]["points"] == 8
    assert [line["size"] for line in table if line["method"] == "random_overlap"] == ["d32"], "all alike"
    picture = plot_interference_of_sizes(rows, ["ours", "random_overlap"], tmp_path / "sizes.svg").read_text()
    one = plot_interference_of_sizes({"d32": rows["d32"]}, ["ours"], tmp_path / "one.svg").read_text()
    assert picture.count('id="axes_') == 2 and one.count('id="axes_') == 1


def test_losses_have_four_decimals_also_beside_words():
    printed = markdown([{"loss": 1.23456, "chrF++": 50.123, "off": 2.345}, {"loss": 2.0, "off": "n/a"}])
    assert "1.2346" in printed and "2.0000" in printed and "50.12 " in printed
    assert "2.35" in printed or "2.34 " in printed
    assert "1.2346" in markdown([{"all Avg": 1.23456}], decimals=4)


def test_columns_are_left_out_of_a_table_but_not_of_its_rows():
    rows = [{"layer": 0, "block": "fc1"}, {"layer": 1}]
    assert markdown(rows, without=["block"]) == markdown([{"layer": 0}, {"layer": 1}]) and rows[0]["block"] == "fc1"


def test_comparisons_of_several_sizes_are_put_together(tmp_path, monkeypatch, capsys):
    recipe = str(Path(__file__).parent.parent / "recipes" / "compare_sizes.py")
    rows = rows_of("fine_tune", [[2, 2, 2, 2]]) + rows_of("ours", [[1.9] * 4])
    stages = [stage("fine_tune"), stage("ours"), stage("bilingual")]
    for size, gap in (("d16", 0.5), ("d32", 0.2)):
        found = {"rows": rows + rows_of("bilingual", [[2 - gap] * 4]), "stages": stages}
        write_results(tmp_path / size, found)
    words = ["--directories", str(tmp_path / "d16"), str(tmp_path / "d32"), "--output_dir", str(tmp_path / "both")]
    words += ["--methods", "ours"]
    monkeypatch.setattr(sys, "argv", [recipe, *words])
    runpy.run_path(recipe, run_name="__main__")
    assert "| ours     | d16" in capsys.readouterr().out
    results = json.loads((tmp_path / "both" / "results.json").read_text())
    assert {row["size"] for row in results["rows"]} == {"d16", "d32"} and len(results["rows"]) == 24
    assert (tmp_path / "both" / "interference.svg").is_file()
    monkeypatch.setattr(sys, "argv", [recipe, *words, "lora"])
    with pytest.raises(SystemExit):
        runpy.run_path(recipe, run_name="__main__")
    assert "No comparison has rows of 'lora'; they have bilingual, fine_tune, ours." in capsys.readouterr().err
    write_results(tmp_path / "d32", {"rows": rows, "stages": stages})
    with pytest.raises(SystemExit):
        runpy.run_path(recipe, run_name="__main__")
    assert "no rows of bilingual: interference is not measured" in capsys.readouterr().err


def test_a_run_that_diverged_is_said_and_leaves_its_cells_empty():
    stages = [stage("fine_tune", validation_losses=[[5, 3], [10, 2]])]
    stages += [stage("ours", validation_losses=[[5, 4], [10, None]])]
    assert curves_table(stages)[1] == {"method": "ours", "seeds": 1, "after 5": 1, "after 10": None}
    assert "WARNING, diverged after the validation that they are left at: ours, seed 0." in budget_facts(
        stages, [], None
    )


def test_a_sweep_knows_what_was_tuned_where_more_seeds_are_to_come():
    rows = rows_of("fine_tune", [[2] * 4]) + rows_of("ours", [[1.5] * 4]) + rows_of("ours_k=0.7", [[1] * 4])
    waiting = swept("ours", 0.95, None) | {"seed": 1, "status": "not begun"}
    del waiting["parts"]
    stages = [stage("fine_tune"), swept("ours", 0.9, None), waiting, swept("ours_k=0.7", 0.7, "k")]
    assert [line["value"] for line in sweep_table(rows, stages)] == ["0.7", "0.9"]
