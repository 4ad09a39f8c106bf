import warnings
from fractions import Fraction

import pytest
import torch

import neuron_specialization as ns
from neuron_specialization import ActivationCounts
from neuron_specialization.neurons.specificity import GeneralSpecific, Specificity


def counts_of(table: dict[str, list[list[int]]], pairs: list[str], tokens: int = 100) -> ActivationCounts:
    counts = {name: torch.as_tensor(rows) for name, rows in table.items()}
    stacks = {name: name.split(".")[0] for name in table}
    totals = {stack: torch.full((len(pairs),), tokens) for stack in ("encoder", "decoder")}
    return ActivationCounts(pairs, counts, totals, stacks)


def kept(masks: ns.NeuronMasks, pair: str, block: str) -> list[int]:
    return masks.row(pair, block).nonzero().flatten().tolist()


def by_hand(counts: list[int], k: float) -> set[int]:
    order = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
    chosen, total = set(), 0
    for i in order:
        if total >= Fraction(str(k)) * sum(counts):
            break
        chosen.add(i)
        total += counts[i]
    return chosen


@pytest.mark.parametrize("k", [0.05, 0.3, 0.5, 0.7, 0.95, 1.0])
def test_cumulative_threshold_follows_the_definition(k):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 6, (3, 40), generator=draw) ** 3
    pairs = ["en-de", "en-fr", "de-en"]
    masks = ns.CumulativeThreshold(k).select(counts_of({"encoder.0": rows.tolist()}, pairs))
    for pair, row in zip(pairs, rows.tolist(), strict=True):
        assert set(kept(masks, pair, "encoder.0")) == by_hand(row, k)


def test_the_crossing_neuron_is_included():
    masks = ns.CumulativeThreshold(0.6).select(counts_of({"encoder.0": [[10, 50, 40, 0]]}, ["en-de"]))
    assert kept(masks, "en-de", "encoder.0") == [1, 2]
    exact = ns.CumulativeThreshold(0.5).select(counts_of({"encoder.0": [[10, 50, 40, 0]]}, ["en-de"]))
    assert kept(exact, "en-de", "encoder.0") == [1]


def test_k_of_1_keeps_all_that_were_active_also_what_rounding_loses_in_the_sum():
    values = torch.tensor([[1e6, 1, 1e-12, 0]], dtype=torch.float64)
    masks = ns.CumulativeThreshold(1.0).select(counts_of({"encoder.0": values}, ["en-de"]))
    assert kept(masks, "en-de", "encoder.0") == [0, 1, 2]


@pytest.mark.parametrize(
    "selector",
    [ns.CumulativeThreshold, ns.TopShare, lambda k: Specificity(k, gamma=0), lambda k: GeneralSpecific(k, kappa=1)],
)
def test_shares_are_compared_exactly(selector):
    """.07 * 100 is 7.000000000000001 in floating point, and 1 - .7 is .30000000000000004."""
    flat = counts_of({"encoder.0": [[10**12] * 100]}, ["en-de"])
    hundredths = {share: n for n in range(1, 101) for share in (n / 100, 1 - (100 - n) / 100)}
    found = {share: len(kept(selector(share).select(flat), "en-de", "encoder.0")) for share in hundredths}
    assert found == hundredths


@pytest.mark.parametrize("share", [0.07, 0.14, 0.28, 0.55, 0.56])
def test_lape_takes_its_shares_exactly(share):
    """All neurons belong to one language; so many of them as the share says are withheld from the other."""
    counts = counts_of({"encoder.0": [[90] * 100, [0] * 100], "decoder.0": [[50] * 100] * 2}, ["de-en", "fr-en"])
    masks = ns.LAPE(entropy_share=share, activity_quantile=0.5).select(counts)
    assert len(kept(masks, "fr-en", "encoder.0")) == 100 - round(100 * share)


def test_lape_gives_no_place_to_what_is_assigned_to_nobody():
    """The first neuron's highest probability is the threshold itself; the second is clearly one language's."""
    counts = counts_of({"encoder.0": [[50, 90], [0, 10]], "decoder.0": [[50, 50]] * 2}, ["de-en", "fr-en"])
    masks = ns.LAPE(entropy_share=0.5, activity_quantile=0.75).select(counts)
    assert kept(masks, "fr-en", "encoder.0") == [0] and kept(masks, "de-en", "encoder.0") == [0, 1]


@pytest.mark.parametrize("selector", [ns.CumulativeThreshold, ns.TopShare])
def test_the_smallest_share_keeps_a_neuron(selector):
    counts = counts_of({"encoder.0": [[1, 5, 2]]}, ["en-de"])
    assert kept(selector(1e-17).select(counts), "en-de", "encoder.0") == [1]


@pytest.mark.parametrize("gamma", [-1, float("nan"), float("inf"), "1"])
def test_an_exponent_is_a_finite_number(gamma):
    with pytest.raises(ValueError, match="gamma is a finite exponent of at least 0"):
        Specificity(gamma=gamma)


def test_lape_keeps_the_pairs_of_a_language_with_itself():
    """Models copy and denoise, too."""
    counts = counts_of({"encoder.0": [[3, 1], [1, 3]], "decoder.0": [[3, 1], [1, 3]]}, ["en-en", "en-de"])
    assert set(ns.LAPE().select(counts).language_pairs) == {"en-en", "en-de"}


@pytest.mark.parametrize("share", [1 / 3, 2 / 3, 1e-9, 0.123456789012, 1])
def test_any_share_is_met_and_not_exceeded(share):
    rows = [[10**12 + i for i in range(30)]]
    masks = ns.CumulativeThreshold(share).select(counts_of({"encoder.0": rows}, ["en-de"]))
    chosen = [rows[0][i] for i in kept(masks, "en-de", "encoder.0")]
    assert sum(chosen) >= share * sum(rows[0]) > sum(chosen) - min(chosen)
    top = ns.TopShare(share).select(counts_of({"encoder.0": rows}, ["en-de"]))
    assert len(kept(top, "en-de", "encoder.0")) == {1 / 3: 10, 2 / 3: 20, 1e-9: 1, 1: 30}.get(share, 4)


def test_k_1_keeps_every_active_neuron_and_no_inactive_one():
    masks = ns.CumulativeThreshold(1.0).select(counts_of({"encoder.0": [[3, 0, 1, 10**12, 0]]}, ["en-de"]))
    assert kept(masks, "en-de", "encoder.0") == [0, 2, 3]


def test_ties_go_to_the_lower_index():
    masks = ns.CumulativeThreshold(0.5).select(counts_of({"encoder.0": [[5, 5, 5, 5]]}, ["en-de"]))
    assert kept(masks, "en-de", "encoder.0") == [0, 1]
    masks = ns.TopShare(0.5).select(counts_of({"encoder.0": [[5, 7, 5, 5]]}, ["en-de"]))
    assert kept(masks, "en-de", "encoder.0") == [0, 1]


def test_stacks_may_differ_in_k():
    counts = counts_of({"encoder.0": [[6, 3, 1]], "decoder.0": [[6, 3, 1]]}, ["en-de"])
    masks = ns.CumulativeThreshold(0.9, encoder_k=0.5).select(counts)
    assert kept(masks, "en-de", "encoder.0") == [0]
    assert kept(masks, "en-de", "decoder.0") == [0, 1]


@pytest.mark.parametrize("selector", [ns.CumulativeThreshold(0.5), ns.TopShare(0.3)])
def test_a_block_without_counts_stays_dense_with_a_warning(selector):
    counts = counts_of({"encoder.0": [[0, 0, 0], [1, 0, 0]]}, ["en-de", "en-fr"])
    with pytest.warns(UserWarning, match="encoder.0.*stay dense"):
        masks = selector.select(counts)
    assert kept(masks, "en-de", "encoder.0") == [0, 1, 2]
    assert kept(masks, "en-fr", "encoder.0") == [0]


@pytest.mark.parametrize("k", [0, -0.1, 1.01, None, "0.5"])
def test_k_outside_its_range_is_refused(k):
    with pytest.raises(ValueError, match=r"k must be a share in \(0, 1\]"):
        ns.CumulativeThreshold(k)
    with pytest.raises(ValueError, match=r"share must be a share in \(0, 1\]"):
        ns.TopShare(k)


def test_random_masks_match_the_number_of_neurons_and_depend_on_the_seed():
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 50, (2, 200), generator=draw).tolist()
    like = ns.CumulativeThreshold(0.5).select(counts_of({"encoder.0": rows}, ["en-de", "en-fr"]))
    random, again, other = (ns.RandomMatched(like, seed).select() for seed in (0, 0, 1))
    assert random.rows["encoder.0"].sum(1).equal(like.rows["encoder.0"].sum(1))
    assert random.rows["encoder.0"].equal(again.rows["encoder.0"])
    assert not random.rows["encoder.0"].equal(other.rows["encoder.0"])
    assert not random.rows["encoder.0"].equal(like.rows["encoder.0"])


def test_lape_withholds_only_neurons_that_belong_to_other_languages():
    """Neuron 0 fires for de alone, neuron 1 for fr alone; the others for both, or hardly ever."""
    row = {"de": [90, 0, 50, 50, 1, 50, 50, 50, 50, 50], "fr": [0, 90, 50, 50, 1, 50, 50, 50, 50, 50]}
    counts = counts_of({"encoder.0": [row["de"], row["fr"]], "decoder.0": [[50] * 10] * 2}, ["de-en", "fr-en"])
    masks = ns.LAPE(entropy_share=0.2, activity_quantile=0.85).select(counts)
    assert kept(masks, "de-en", "encoder.0") == [0, *range(2, 10)]
    assert kept(masks, "fr-en", "encoder.0") == list(range(1, 10))
    assert kept(masks, "de-en", "decoder.0") == list(range(10))


def test_lape_refuses_models_whose_source_carries_the_target_tag():
    counts = counts_of({"encoder.0": [[1, 2]]}, ["en-de"])
    counts.source_tag = "target"
    with pytest.raises(ValueError, match="Marian"):
        ns.LAPE().select(counts)


def test_selection_warns_of_nothing_else():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ns.CumulativeThreshold(0.95).select(counts_of({"encoder.0": [[1, 2, 3]]}, ["en-de"]))
