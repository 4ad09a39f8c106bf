"""Controls and relative selectors: what each leaves as it is, and what it changes."""

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model

import neuron_specialization as ns
from neuron_specialization import ActivationCounts

from .conftest import PAIRS, make_batch, make_m2m100, make_masks
from .test_selection import by_hand, counts_of, kept

TWO = ["en-de", "en-fr"]


def random_counts(pairs=tuple(PAIRS), tokens=1000, seed=0) -> ActivationCounts:
    draw = torch.Generator().manual_seed(seed)
    table = {
        name: torch.randint(0, tokens, (len(pairs), 40), generator=draw).tolist()
        for name in ("encoder.0", "decoder.0")
    }
    return counts_of(table, list(pairs), tokens)


def test_random_overlap_keeps_sizes_and_overlaps_and_nothing_else():
    like = ns.CumulativeThreshold(0.6).select(random_counts())
    control, again, other = (ns.RandomOverlap(like, seed).select() for seed in (0, 0, 1))
    for name, rows in like.rows.items():
        permuted = control.rows[name]
        assert (permuted.long() @ permuted.long().T).equal(rows.long() @ rows.long().T), "sizes and intersections"
        assert not permuted.equal(rows) and permuted.equal(again.rows[name])
        assert not permuted.equal(other.rows[name])
    assert not control.rows["encoder.0"].equal(control.rows["decoder.0"])
    assert control.iou(*TWO) == like.iou(*TWO) and control.selector["like"] == like.selector


def test_wrong_pair_runs_a_pair_under_anothers_masks():
    model = make_m2m100()
    masks = make_masks(model, k=0.4)
    exchanged = ns.WrongPair(masks, {"de": "fr", "fr": "de"}).select()
    right, wrong = (
        get_peft_model(
            make_m2m100(), ns.NeuronSpecializationConfig(masks=m, trainable="none", task_type="SEQ_2_SEQ_LM")
        )
        for m in (masks, exchanged)
    )
    batch = make_batch()
    with torch.no_grad():
        for pair, other in (("en-de", "en-fr"), ("fr-en", "de-en")):
            given = wrong(**batch, language_pairs=[pair]).logits
            torch.testing.assert_close(given, right(**batch, language_pairs=[other]).logits)
            assert not given.allclose(right(**batch, language_pairs=[pair]).logits)


def test_wrong_pair_takes_factorized_masks_and_zero_shot_pairs(tmp_path):
    like = ns.CumulativeThreshold(0.6).select(random_counts())
    exchange = {"de": "fr", "fr": "de"}
    factorized = ns.WrongPair(like.factorize(), exchange).select()
    assert factorized.row("en-de", "decoder.0").equal(like.row("en-fr", "decoder.0"))
    composed = ns.WrongPair(like, exchange).select().compose("de-fr")
    assert composed.row("de-fr", "encoder.0").equal(like.row("fr-en", "encoder.0"))
    composed.save_pretrained(tmp_path)
    assert ns.NeuronMasks.from_pretrained(tmp_path).row("de-en", "encoder.0").equal(like.row("fr-en", "encoder.0"))


def test_wrong_pair_refuses_what_is_no_exchange():
    like = ns.CumulativeThreshold(0.6).select(random_counts())
    for exchange in ({"de": "fr"}, {}, {"de": "de", "fr": "zh", "zh": "fr"}):
        with pytest.raises(ValueError, match="permutation"):
            ns.WrongPair(like, exchange)
    with pytest.raises(ValueError, match="masks of en-zh"):
        ns.WrongPair(like, {"de": "zh", "zh": "de"}).select()


def test_controls_keep_where_masks_come_from():
    """Else their adapters would neither read language tokens nor notice another checkpoint."""
    counts = replace(
        random_counts(),
        language_token_ids={"en": 1, "de": 2, "fr": 3},
        base_model_name_or_path="here",
        weights_sample=[0.5],
    )
    like = ns.CumulativeThreshold(0.6).select(counts)
    exchange = {"de": "fr", "fr": "de"}
    for control in (ns.Pooled(like), ns.Pooled(like, "en"), ns.RandomOverlap(like), ns.WrongPair(like, exchange)):
        masks = control.select(counts)
        assert {name: getattr(masks, name) for name in counts.origin} == counts.origin


@pytest.mark.parametrize("pivot", [None, "en"])
def test_pooled_masks_are_one_for_a_group_of_matched_size(pivot):
    counts = random_counts()
    counts.language_token_ids = {"en": 1}
    like = ns.CumulativeThreshold(0.6).select(counts)
    pooled = ns.Pooled(like, pivot).select(counts)
    assert pooled.language_token_ids == like.language_token_ids == {"en": 1}
    groups = [PAIRS] if pivot is None else [PAIRS[0::2], PAIRS[1::2]]
    for group in groups:
        for name in counts.counts:
            sizes = [len(kept(like, pair, name)) for pair in group]
            total = sum(counts.counts[name][PAIRS.index(pair)] for pair in group).tolist()
            best = sorted(range(40), key=lambda i: (-total[i], i))[: round(sum(sizes) / len(sizes))]
            assert all(kept(pooled, pair, name) == sorted(best) for pair in group)
    assert (pooled.iou("en-de", "de-en")["encoder.0"] == 1) == (pivot is None)


def test_pooling_weighs_pairs_alike_whatever_their_size():
    counts = counts_of({"encoder.0": [[900, 0, 500], [0, 9, 5]]}, TWO)
    counts.tokens["encoder"] = torch.tensor([1000, 10])
    like = ns.TopShare(1 / 3).select(counts)
    assert kept(ns.Pooled(like).select(counts), "en-de", "encoder.0") == [2]


def test_pairs_beside_the_pivot_are_in_no_group():
    counts = random_counts(["en-de", "de-fr"])
    with pytest.raises(ValueError, match="de-fr neither leaves nor enters"):
        ns.Pooled(ns.TopShare(0.5).select(counts), "en").select(counts)


def test_general_and_specific_neurons_follow_the_definition():
    """Neurons 0 and 1 are general; 2 is for de alone, 3 for fr; 4 and 5 are weaker, but as strong for both."""
    counts = counts_of({"encoder.0": [[90, 80, 50, 0, 30, 30], [90, 80, 0, 50, 30, 26]]}, TWO)
    masks = ns.GeneralSpecific(rho=2 / 6, kappa=0.9).select(counts)
    assert kept(masks, "en-de", "encoder.0") == [0, 1, 2, 4, 5]
    assert kept(masks, "en-fr", "encoder.0") == [0, 1, 3, 4]
    assert kept(ns.GeneralSpecific(rho=0.5, kappa=1.0).select(counts), "en-de", "encoder.0") == [0, 1, 4]
    assert masks.selector == {"name": "GeneralSpecific", "rho": 2 / 6, "kappa": 0.9}


@pytest.mark.parametrize("k", [0.3, 0.7, 0.95, 1.0])
def test_specificity_of_exponent_0_is_the_papers_rule(k):
    counts = random_counts()
    counts.tokens["encoder"] = torch.tensor([1000, 1300, 1700, 2900])
    ours, paper = ns.Specificity(k, gamma=0).select(counts), ns.CumulativeThreshold(k).select(counts)
    assert all(ours.rows[name].equal(rows) for name, rows in paper.rows.items())


@pytest.mark.parametrize("gamma", [1, 2])
def test_specificity_weighs_activity_by_its_share_of_the_mean(gamma):
    rows = [[60, 60, 10, 40], [60, 20, 30, 40]]
    masks = ns.Specificity(0.5, gamma).select(counts_of({"encoder.0": rows}, TWO))
    means = [(a + b) / 2 for a, b in zip(*rows, strict=True)]
    for pair, row in zip(TWO, rows, strict=True):
        score = [value * (value / mean) ** gamma for value, mean in zip(row, means, strict=True)]
        assert set(kept(masks, pair, "encoder.0")) == by_hand(score, 0.5)
    with pytest.raises(ValueError, match="at least 0"):
        ns.Specificity(gamma=-1)


@pytest.mark.parametrize("selector", [ns.GeneralSpecific(0.5, 0.9), ns.Specificity(0.9, 1)])
def test_a_pair_without_counts_stays_dense_and_a_dead_neuron_is_not_kept(selector):
    counts = counts_of({"encoder.0": [[0, 0, 0, 0], [9, 5, 0, 0]]}, TWO)
    with pytest.warns(UserWarning, match="stay dense"):
        masks = selector.select(counts)
    assert kept(masks, "en-de", "encoder.0") == [0, 1, 2, 3]
    assert kept(masks, "en-fr", "encoder.0") == [0, 1]
