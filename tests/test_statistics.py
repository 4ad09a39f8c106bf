"""Significance, tables and figures of a comparison, on rows whose truth is known."""

import numpy as np
import pytest

from neuron_specialization.analysis.comparison import headroom, interference, main_table, premise
from neuron_specialization.analysis.plots import plot_differences, plot_interference
from neuron_specialization.analysis.statistics import (
    hierarchical_bootstrap,
    paired_bootstrap,
    paired_differences,
    spread,
)

DIRECTIONS = ["en-de", "en-fr", "de-en", "fr-en"]


def rows_of(method: str, losses: list[list[float]], chrf: float = 50.0, first_seed: int = 0) -> list[dict]:
    """Rows from losses [seeds][directions]."""
    return [
        {"method": method, "seed": seed, "direction": direction, "loss": loss, "chrf++": chrf, "bleu": 20.0}
        for seed, of in enumerate(losses, first_seed)
        for direction, loss in zip(DIRECTIONS, of, strict=True)
    ]


def stage(method: str, seed: int = 0, **changes) -> dict:
    costs = {"extra_parameters": 0, "mask_bytes": 10, "parts": 1, "seconds": 2.0, "updates": 5}
    return {"method": method, "seed": seed, "status": "done", **costs, **changes}


def test_differences_are_paired_by_seed_and_direction():
    rows = rows_of("fine_tune", [[1, 2, 3, 4], [2, 3, 4, 5]]) + rows_of("ours", [[0.9, 2, 3, 4.5], [2, 3, 4, 5]])
    differences, seeds, directions = paired_differences(rows, "ours", "fine_tune", "loss")
    assert seeds == [0, 1] and directions == DIRECTIONS
    np.testing.assert_allclose(differences, [[-0.1, 0, 0, 0.5], [0, 0, 0, 0]])
    other_seed = rows_of("ours", [[1, 1, 1, 1]], first_seed=7)
    differences, seeds, _ = paired_differences([*rows[:8], *other_seed], "ours", "fine_tune", "loss")
    np.testing.assert_allclose(differences, [[-0.5, -1.5, -2.5, -3.5]])
    with pytest.raises(ValueError, match="lacks rows"):
        paired_differences(rows[:-1], "ours", "fine_tune", "loss")
    with pytest.raises(ValueError, match="no rows of 'lora'"):
        paired_differences(rows, "lora", "fine_tune", "loss")


def test_the_interval_covers_the_truth_and_widens_with_both_kinds_of_chance():
    draw = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        seeds, directions = draw.normal(0, 0.1, (5, 1)), draw.normal(0, 0.1, (1, 12))
        interval = hierarchical_bootstrap(0.5 + seeds + directions + draw.normal(0, 0.05, (5, 12)), 500, trial)
        covered += interval["low"] <= 0.5 <= interval["high"]
    assert covered >= 50  # 95 %, less what percentile intervals of five seeds lose
    across_seeds = np.array([[0.0] * 6, [1.0] * 6])
    across_directions = np.tile([0.0, 1.0], (2, 3))
    for differences in (across_seeds, across_directions):
        interval = hierarchical_bootstrap(differences)
        assert interval["low"] < 0.4 and interval["high"] > 0.6 and interval["mean"] == 0.5
    clear = hierarchical_bootstrap(np.full((3, 12), -0.2) + draw.normal(0, 0.01, (3, 12)))
    assert clear["high"] < 0 and clear["p"] < 0.01
    assert hierarchical_bootstrap(draw.normal(0, 1, (3, 20)))["p"] > 0.01
    assert hierarchical_bootstrap(np.array([[-1.0, 1.0] * 5]))["p"] == 1, "two-sided"
    assert hierarchical_bootstrap(np.full((2, 4), -1.0))["p"] == 0.125, "four signs that agree, by a sign test"


def test_directions_are_tested_by_sacrebleu_with_a_correction():
    draw = np.random.default_rng(0)
    words = ["house", "tree", "river", "stone", "light", "bread", "night", "wind"]
    references = {pair: [" ".join(draw.choice(words, 6)) for _ in range(30)] for pair in DIRECTIONS}
    before = {pair: [" ".join(draw.choice(words, 6)) for _ in texts] for pair, texts in references.items()}
    after = {**before, "en-de": references["en-de"]}
    tested = paired_bootstrap(after, before, references, samples=100)
    assert tested["en-de"]["significant"] and tested["en-de"]["difference"] > 20
    assert not any(tested[pair]["significant"] or tested[pair]["difference"] for pair in DIRECTIONS[1:])
    assert tested["en-de"]["adjusted"] == pytest.approx(len(DIRECTIONS) * tested["en-de"]["p"]), "others have p = 1"


@pytest.mark.parametrize(("bilingual", "chrf", "met"), [(1.8, 50, True), (1.995, 50, False), (1.995, 50.6, True)])
def test_the_premise_asks_for_one_percent_of_loss_or_half_a_point(bilingual, chrf, met):
    rows = rows_of("fine_tune", [[2, 2, 2, 2]]) + rows_of("bilingual", [[bilingual] * 4], chrf)
    measured = headroom(rows)
    assert measured["met"] is met and measured["ceilings"][0]["headroom"] is met
    assert ("NOT met" in premise(measured)) != met
    unfinished = rows_of("fine_tune", [[2, 8, 8, 8]]) + rows_of("bilingual", [[1.8, 0, 0, 0]])[:1]
    assert headroom(unfinished)["ceilings"][0]["loss gained, %"] == pytest.approx(10), "of the same directions' loss"
    assert headroom(unfinished)["ceilings"][0]["directions"] == "1/4" and headroom(unfinished)["met"] is None
    other_seeds = rows_of("fine_tune", [[2] * 4, [9] * 4]) + rows_of("bilingual", [[1.8] * 4])
    assert headroom(other_seeds)["ceilings"][0]["loss gained, %"] == pytest.approx(10), "and of the same seeds'"
    assert headroom(rows[:4])["met"] is None and "not tested" in premise(headroom(rows[:4]))


def test_the_main_table_shows_every_method_and_failures_as_failed():
    rows = rows_of("fine_tune", [[1, 2, 3, 4], [1, 2, 3, 4]]) + rows_of("ours", [[0.5, 1.5, 3, 5], [0.5, 1.5, 3, 5]])
    stages = [stage("fine_tune"), stage("fine_tune", 1), stage("ours"), stage("ours", 1)]
    stages += [{"method": "lora", "seed": 0, "status": "failed", "error": "ValueError: no"}]
    stages += [stage("bilingual", status="1 of 4 parts")]
    rows += rows_of("bilingual", [[1, 1, 1, 1]])[:1]
    stages[2]["learning_rate"], stages[2]["identification_seconds"] = 3e-3, 90
    trials = [{"method": "ours", "learning_rate": rate} for rate in (1e-3, 3e-3)]
    stages[0]["learning_rate"], stages[2]["kept"] = 3e-3, 0.75
    trials += [{"method": "fine_tune", "learning_rate": 3e-3, "knobs": {"k": k}} for k in (0.5, 0.9)]
    table = {line["method"]: line for line in main_table(rows, stages, trials)}
    assert (
        table["ours"]["learning rate"] == "0.003 (edge of the grid)"
        and table["ours"]["minutes to find subnets"] == 1.5
    )
    assert table["fine_tune"]["learning rate"] == "0.003", "the only one, tried with several values of a knob"
    assert table["ours"]["kept, %"] == 75 and "kept, %" not in table["fine_tune"]
    assert table["ours"]["Δ loss"] == pytest.approx(0.0) and table["ours"]["better in"] == "2/4"
    assert table["ours"]["seeds"] == 2 and table["ours"]["± loss"] == 0
    assert "Δ loss, seed 0" in table["ours"] and table["ours"]["± chrF++"] == 0
    assert table["lora"]["unfinished"] == "seed 0: ValueError: no" and table["lora"]["seeds"] == 0
    assert table["bilingual"]["unfinished"] == "seed 0: 1 of 4 parts" and table["bilingual"]["better in"] == "0/1"
    assert spread(rows[:4], "fine_tune", "loss")[1] is None, "one seed has no spread"


def test_methods_with_one_seed_and_with_several_are_compared_on_the_seed_that_they_share():
    """Joint fine-tuning is better with its second seed, so a method without one seems better than it is."""
    rows = rows_of("fine_tune", [[2] * 4, [1] * 4]) + rows_of("ours", [[1.5] * 4, [1.5] * 4])
    rows += rows_of("lora", [[1.6] * 4]) + rows_of("bilingual", [[1.0] * 4])
    stages = [stage(method, seed) for method in ("fine_tune", "ours") for seed in (0, 1)] + [stage("lora")]
    table = {line["method"]: line for line in main_table(rows, stages)}
    shown = {name: (table[name]["Δ loss"], table[name]["Δ loss, seed 0"]) for name in ("ours", "lora")}
    assert shown == {"ours": (0.0, -0.5), "lora": (pytest.approx(-0.4), pytest.approx(-0.4))}
    points = interference(rows, "ours")
    assert {point["interference"] for point in points} == {1.0} and {point["difference"] for point in points} == {0.0}


def test_figures_are_made_from_the_rows_alone(tmp_path):
    rows = rows_of("fine_tune", [[2, 2, 3, 4]]) + rows_of("ours", [[1.9, 2.2, 3, 4]])
    rows += rows_of("bilingual", [[1, 2.5, 3, 3]])
    points = {point["direction"]: point for point in interference(rows, "ours")}
    assert points["en-de"]["interference"] == 1 and points["en-fr"]["interference"] == -0.5
    assert points["en-de"]["difference"] == pytest.approx(-0.1)
    pictures = []
    for name in ("a", "b"):
        differences = plot_differences(rows, tmp_path / name / "differences.svg")
        scatter = plot_interference(rows, ["ours"], tmp_path / name / "interference.svg")
        pictures.append((differences.read_bytes(), scatter.read_bytes()))
    assert pictures[0] == pictures[1] and b"<svg" in pictures[0][0]
