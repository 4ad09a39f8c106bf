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
from neuron_specialization.analysis.pruning_choices import needs_tokens, parse_exports

from .conftest import make_batch, make_m2m100


@pytest.fixture(scope="module")
def model():
    return make_m2m100(activation_function="gelu")


@pytest.fixture(scope="module")
def mass(model):
    texts = {"en-de": [make_batch(seed=0)], "en-fr": [make_batch(seed=1)]}
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
    if criterion == "specialized":
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


def test_substitutes_have_the_mass_of_what_they_stand_for(mass):
    masks = prune(pruning_scores(mass, "specialized"), 0.2, mass.origin)
    matched = mass_matched(masks, mass, seed=1, nearest=2)
    for name, rows in masks.rows.items():
        assert not (~matched.rows[name] & ~rows).any() and (~matched.rows[name]).sum() == (~rows).sum()
    gone, instead = (mass_shares(each, mass)["positive mass"] for each in (masks, matched))
    drawn = mass_shares(prune(pruning_scores(mass, "random", seed=1), 0.2, mass.origin), mass)["positive mass"]
    assert abs(instead - gone) < 0.2 * gone < abs(drawn - gone)
    other = mass_matched(masks, mass, seed=2, nearest=2)
    assert any(not other.rows[name].equal(rows) for name, rows in matched.rows.items())
    most = prune(pruning_scores(mass, "most_positive"), 0.2, mass.origin)
    lighter = mass_shares(mass_matched(most, mass, seed=1, nearest=2), mass)["positive mass"]
    assert drawn < lighter < 0.9 * mass_shares(most, mass)["positive mass"], "nothing as heavy is left"


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
    assert {"dead, layer", "dead, global", "unspecialized:en-de", "60"} <= set(texts)
    few = re.findall("<!-- (.*?) -->", plot_pruning(rows[:3], tmp_path / "few.svg").read_text())
    assert "dead" in few and "20" in few and "40" not in few


def test_choices_are_read():
    assert parse_exports(["dead=0.1", "unspecialized:en-de=0.2"]) == {"dead": 0.1, "unspecialized:en-de": 0.2}
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
    relu = record_mass(make_m2m100(), {"a": [make_batch()]}, progress=False)
    with pytest.raises(ValueError, match="Nothing is negative"):
        pruning_scores(relu, "most_negative")
    with pytest.raises(ValueError, match="needs credit by token"):
        pruning_scores(relu, "shortest")
    with pytest.raises(ValueError, match="compares sets of text"):
        pruning_scores(relu, "general")
    residual = record_mass(model, {"a": [make_batch()]}, "residual", progress=False)
    with pytest.raises(ValueError, match="residual stream"):
        pruning_scores(residual, "random")
