"""Which neurons each criterion prunes, that pruned neurons output 0 for every pair, and the curves of the costs."""

import copy
import dataclasses
import re

import pytest
import torch
from peft import get_peft_model

import neuron_specialization as ns
from neuron_specialization.analysis.mass_plots import plot_pruning
from neuron_specialization.analysis.mass_recording import record_mass
from neuron_specialization.analysis.pruning import CRITERIA, NO_MASS, mass_matched, mass_shares, prune, pruning_scores
from neuron_specialization.analysis.pruning_choices import choose, needs_tokens, parse_exports

from .conftest import make_batch, make_m2m100


@pytest.fixture(scope="module")
def model():
    return make_m2m100(activation_function="gelu")


@pytest.fixture(scope="module")
def mass(model):
    texts = {"en-de": [make_batch(seed=0)], "fr-es": [make_batch(seed=1)]}
    return record_mass(model, texts, token_ids=range(60), progress=False)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_highest_scores_go_first(mass, criterion):
    scores = pruning_scores(mass, criterion, seed=3)
    layer = next(iter(scores))
    pruned = ~prune(scores, 0.25, mass.origin).rows[layer][0]
    dead = mass.wins[layer].sum(0) == 0
    assert int(pruned.sum()) == min(5, int(dead.sum())) if criterion == "dead" else int(pruned.sum()) == 5
    measures = {
        "most_activated": mass.active[layer].sum(0),
        "least_activated": -mass.active[layer].sum(0),
        "most_positive": mass.positive[layer].sum(0),
        "most_negative": mass.negative[layer].sum(0),
    }
    if criterion in measures:
        assert measures[criterion][pruned].min() >= measures[criterion][~pruned].max()
    if criterion in ("shortest", "longest"):
        length = sum((mass.token_credit[layer][row, :, :-1] > 0) for row in (0, 1)).bool().sum(1)
        left = length[~pruned & (mass.wins[layer].sum(0) > 0)]
        extremes = (
            (length[pruned].max(), left.min()) if criterion == "shortest" else (left.max(), length[pruned].min())
        )
        assert extremes[0] <= extremes[1] and mass.wins[layer].sum(0)[pruned].all()
    if criterion == "dead":
        assert not mass.wins[layer].sum(0)[pruned].any()
        active = mass.active[layer].sum(0)
        assert 0 < pruned.sum() < dead.sum() and active[pruned].max() <= active[dead & ~pruned].min()
    if criterion == "specialized":
        languages = mass.active[layer] / mass.positions[mass.stacks[layer]].unsqueeze(1)
        balance = (languages.min(0).values / languages.max(0).values).nan_to_num(nan=1.0)
        assert balance[pruned].max() <= balance[~pruned].min()
        general = ~prune(pruning_scores(mass, "general"), 0.25, mass.origin).rows[layer][0]
        assert not (general & pruned).any()


def test_pruned_neurons_output_zero_whatever_the_pair(model, mass):
    masks = prune(pruning_scores(mass, "least_activated"), 0.3, mass.origin)
    reference, batch = copy.deepcopy(model), make_batch()
    with torch.no_grad():
        for block in ns.find_ffn_blocks(reference):
            block.down.weight[:, ~masks.rows[block.name][0]] = 0
    config = ns.NeuronSpecializationConfig(masks=masks, trainable="none", mask_bias=True, task_type="SEQ_2_SEQ_LM")
    pruned = get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        torch.testing.assert_close(pruned(**batch).logits, reference(**batch).logits)
    small = ns.compact(pruned, "default")
    assert {b.d_ff for b in ns.find_ffn_blocks(small) if b.stack == "encoder"} == {14}


def test_pruned_masks_know_their_checkpoint(mass):
    """So that they are not loaded on another one without a word."""
    masks = prune(pruning_scores(mass, "random"), 0.3, mass.origin)
    for found in (masks, mass_matched(masks, mass)):
        assert {name: getattr(found, name) for name in mass.origin} == mass.origin
        config = ns.NeuronSpecializationConfig(masks=found, mask_bias=True, task_type="SEQ_2_SEQ_LM")
        other = make_m2m100(activation_function="gelu")
        torch.nn.init.normal_(ns.find_ffn_blocks(other)[0].down.weight)
        with pytest.warns(UserWarning, match="other weights"):
            get_peft_model(other, config)


def test_a_global_rate_is_met_over_all_blocks(mass):
    scores = pruning_scores(mass, "least_activated")
    masks = prune(scores, 0.5, mass.origin, scope="global")
    total = sum(len(score) for score in scores.values())
    assert sum(int((~rows).sum()) for rows in masks.rows.values()) == total // 2
    widths = {name: int(rows.sum()) for name, rows in masks.rows.items()}
    assert len(set(widths.values())) > 2, "blocks differ"
    nearly_all = prune(scores, 0.99, mass.origin, scope="global")
    assert all(rows.any() for rows in nearly_all.rows.values())


@pytest.mark.parametrize("criterion", ["most_positive", "dead", "specialized"])
def test_random_neurons_of_the_same_mass(mass, criterion):
    masks = prune(pruning_scores(mass, criterion), 0.4, mass.origin)
    matched = mass_matched(masks, mass, seed=1)
    for name, rows in masks.rows.items():
        total = mass.positive[name].sum(0)
        gone, instead = (total[~each.rows[name][0]].sum() for each in (masks, matched))
        assert abs(instead - gone) <= total.max() / 2 and not matched.rows[name].equal(rows)
    pruned, instead = (sum(int((~rows).sum()) for rows in each.rows.values()) for each in (masks, matched))
    assert criterion != "most_positive" or instead > pruned, "others are lighter"
    other = mass_matched(masks, mass, seed=2)
    assert any(not other.rows[name].equal(rows) for name, rows in matched.rows.items())


def test_a_block_keeps_a_neuron_where_all_mass_is_in_one(mass):
    block = next(iter(mass.positive))
    alone = {**mass.positive, block: torch.zeros_like(mass.positive[block])}
    alone[block][:, 3] = 1.0
    heavy = dataclasses.replace(mass, positive=alone)
    masks = prune(pruning_scores(heavy, "most_positive"), 0.2, heavy.origin)
    drawn = [mass_matched(masks, heavy, seed).rows[block] for seed in range(60)]
    assert all(rows.any() for rows in drawn) and any(not rows[0, 3] for rows in drawn)


@pytest.mark.parametrize("criterion", ["most_activated", "least_activated", "most_positive", "most_negative"])
def test_stacks_compare_per_position(model, criterion):
    batch = make_batch(source=40, target=4)
    mass = record_mass(model, {"en-de": [batch]}, progress=False)
    masks = prune(pruning_scores(mass, criterion), 0.3, mass.origin, scope="global")
    sums = {"most_positive": mass.positive, "most_negative": mass.negative}.get(criterion, mass.active)
    per_position = {name: of.sum(0) / mass.positions[mass.stacks[name]].sum() for name, of in sums.items()}
    pruned, kept = (
        torch.cat([values[masks.rows[name][0] == keeps] for name, values in per_position.items()])
        for keeps in (False, True)
    )
    if criterion == "least_activated":
        assert pruned.max() <= kept.min()
    else:
        assert pruned.min() >= kept.max()


def test_languages_are_those_of_the_stack_s_side(model):
    text = {"en-de": [make_batch(seed=0)], "en-fr": [make_batch(seed=1)], "en-es": [make_batch(seed=2)]}
    mass = record_mass(model, text, progress=False)
    with pytest.warns(UserWarning, match="encoder has a single language, en: 'general' prunes none"):
        scores = pruning_scores(mass, "general")
    masks = prune(scores, 0.25, mass.origin)
    assert {mass.stacks[name] for name, rows in masks.rows.items() if not rows.all()} == {"decoder"}
    twice = {"en-de": text["en-de"], "fr-de": text["en-fr"], "es-de": text["en-es"]}
    with pytest.warns(UserWarning, match="decoder has a single language, de"):
        pruning_scores(record_mass(model, twice, progress=False), "specialized")
    both = record_mass(model, {"en-de": text["en-de"], "fr-de": text["en-fr"], "fr-es": text["en-es"]}, progress=False)
    decoder = next(name for name, stack in both.stacks.items() if stack == "decoder")
    active, positions = both.active[decoder].double(), both.positions["decoder"]
    german = (active[0] + active[1]) / (positions[0] + positions[1])  # of both pairs into German
    shares = torch.stack([german, active[2] / positions[2]])
    entropy = torch.special.entr(shares / shares.sum(0)).sum(0)
    found, on = pruning_scores(both, "general")[decoder], shares.sum(0) > 0
    torch.testing.assert_close(found[on], entropy[on])


def test_what_a_pair_leaves_out_is_pruned(mass):
    counts = ns.ActivationCounts(mass.names, mass.active, mass.positions, mass.stacks, mass.fingerprint)
    masks = ns.CumulativeThreshold(0.7).select(counts)
    chosen = choose(mass, "unspecialized:fr-es", 0.3)
    for block, rows in chosen.rows.items():
        assert rows[0].equal(masks.row("fr-es", block)) and not rows[0].equal(masks.row("en-de", block)), block


def test_the_mass_of_pruned_neurons_is_a_share_of_all(mass):
    masks = prune(pruning_scores(mass, "random"), 0.3, mass.origin)
    found, kept = mass_shares(masks, mass), {name: ~rows for name, rows in masks.rows.items()}
    for sign, of in (("positive mass", mass.positive), ("negative mass", mass.negative)):
        pruned = sum(float(of[name][:, ~rows[0]].sum()) for name, rows in masks.rows.items())
        assert found[sign] == pytest.approx(pruned / sum(float(values.sum()) for values in of.values()))
    rest = mass_shares(dataclasses.replace(masks, rows=kept), mass)
    assert rest["positive mass"] == pytest.approx(1 - found["positive mass"])
    assert mass_shares(prune(pruning_scores(mass, "dead"), 0.0, mass.origin), mass) == NO_MASS


def test_a_line_for_each_scope_up_to_the_last_point(tmp_path):
    points = [("none", "layer", 0, 9), ("dead", "layer", 0.1, 8), ("dead", "layer", 0.3, 6)]
    points += [("dead", "global", 0.2, 7), ("unspecialized:en-de", "layer", 0.58, 2)]
    names = ("criterion", "scope", "pruned", "bleu")
    rows = [dict(zip(names, point, strict=True)) for point in points]
    texts = re.findall("<!-- (.*?) -->", plot_pruning(rows, tmp_path / "all.svg").read_text())
    assert {"dead, layer", "dead, global", "unspecialized:en-de", "60", "whole model"} <= set(texts)
    few = re.findall("<!-- (.*?) -->", plot_pruning(rows[:3], tmp_path / "few.svg").read_text())
    assert "dead" in few and "20" in few and "40" not in few


def test_no_two_lines_look_alike_and_draws_have_a_band(tmp_path):
    rows = [
        {"criterion": f"c{i}", "scope": "layer", "pruned": 0.1 * step, "bleu": i + step}
        for i in range(12)
        for step in (1, 2)
    ]
    plain = plot_pruning(rows, tmp_path / "plain.svg").read_text()
    looks = re.findall(r'<use xlink:href="#(\w+)" x="[^"]+" y="[^"]+" style="([^"]+)"', plain)
    assert len({look for look in looks if "stroke-width" not in look[1]}) == 12, "ticks have a width"
    drawn = [{**row, "lowest": row["bleu"] - 1, "highest": row["bleu"] + 1} for row in rows[:2]]
    plot_pruning([drawn[0], rows[1]], tmp_path / "unfinished.svg")  # of the second rate there is one draw so far
    for told in ("fill-opacity: 0.15", "bands: several draws"):
        assert told in plot_pruning(drawn, tmp_path / "drawn.svg").read_text() and told not in plain


def test_choices_are_read():
    exports = [("dead", 0.1), ("dead", 0.2), ("unspecialized:en-de", 0.2)]
    assert parse_exports(["dead=0.1", "dead=0.2", "unspecialized:en-de=0.2"]) == exports
    for word in ("dead=x", "dead", "dead="):
        with pytest.raises(ValueError, match=f"Expected criterion=rate to export, .* got '{word}'"):
            parse_exports([word])
    assert needs_tokens(["dead", "mass_matched:longest"]) and needs_tokens(["shortest"])
    assert not needs_tokens(["dead", "unspecialized:en-de", "mass_matched:most_positive"])


def test_bad_input_is_refused(mass, model):
    scores = pruning_scores(mass, "random")
    for rate in (-0.1, 1, 1.5):
        with pytest.raises(ValueError, match=r"share in \[0, 1\)"):
            prune(scores, rate, mass.origin)
    with pytest.raises(ValueError, match="criterion must be one of dead"):
        pruning_scores(mass, "alive")
    relu = record_mass(make_m2m100(), {"en-de": [make_batch()]}, progress=False)
    with pytest.raises(ValueError, match="Nothing is negative"):
        pruning_scores(relu, "most_negative")
    with pytest.raises(ValueError, match="needs credit by token"):
        pruning_scores(relu, "shortest")
    with pytest.raises(ValueError, match="compares languages of one side; the recording holds en-de"):
        pruning_scores(relu, "general")
    residual = record_mass(model, {"a": [make_batch()]}, "residual", progress=False)
    with pytest.raises(ValueError, match="residual stream"):
        pruning_scores(residual, "random")
