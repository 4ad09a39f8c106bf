"""Which neurons each criterion prunes, and that pruned neurons output 0 for every pair."""

import copy

import pytest
import torch
from peft import get_peft_model

import neuron_specialization as ns
from neuron_specialization.analysis.mass_recording import record_mass
from neuron_specialization.analysis.pruning import CRITERIA, mass_matched, prune, pruning_scores

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
    masks = prune(pruning_scores(mass, "most_positive"), 0.2, mass.origin)
    matched = mass_matched(masks, mass, seed=1, nearest=2)
    random = prune(pruning_scores(mass, "random", seed=1), 0.2, mass.origin)
    gone = instead = drawn = 0.0
    for name, rows in masks.rows.items():
        total = mass.positive[name].sum(0)
        assert not (~matched.rows[name] & ~rows).any() and (~matched.rows[name]).sum() == (~rows).sum()
        gone += total[~rows[0]].sum()
        instead += total[~matched.rows[name][0]].sum()
        drawn += total[~random.rows[name][0]].sum()
    assert drawn < instead < gone, "the most positive ones are gone, so substitutes stay below, and above chance"
    other = mass_matched(masks, mass, seed=2, nearest=2)
    assert any(not other.rows[name].equal(rows) for name, rows in matched.rows.items())


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
