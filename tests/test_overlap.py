"""Overlap of neurons against the distance of languages: known relations are found, and shuffled ones are not."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from neuron_specialization.analysis.distances import families, language_distances, script_distances
from neuron_specialization.analysis.overlap import holm, mantel, neuron_overlap, overlap_rows
from neuron_specialization.neurons.language_pairs import Routes
from neuron_specialization.neurons.masks import NeuronMasks
from neuron_specialization.translation.toy import PIVOT, ToyLanguages

BLOCKS = {"encoder.0": "encoder", "encoder.1": "encoder", "decoder.0": "decoder"}


@pytest.fixture(scope="module")
def related():
    """Languages whose roots descend from common ancestors, and masks that change where their roots do."""
    toy = ToyLanguages(families=2, languages_per_family=4, seed=1)
    languages = toy.languages[1:]
    pairs = [f"{code}-{PIVOT}" for code in languages] + [f"{PIVOT}-{code}" for code in languages]
    draw = torch.Generator().manual_seed(0)
    rows = {}
    for name in BLOCKS:
        ancestors = {family: torch.rand(400, generator=draw) < 0.7 for family in sorted(set(toy.family.values()))}
        own = [ancestors[toy.family[c]] ^ (torch.rand(400, generator=draw) < 0.1) for c in languages]
        rows[name] = torch.stack(own + own)
    return toy, NeuronMasks(rows, BLOCKS, Routes.per_pair(pairs))


def test_overlap_takes_the_side_that_differs(related):
    toy, masks = related
    overlap = neuron_overlap(masks, "encoder", PIVOT)
    assert overlap.languages == toy.languages[1:] and overlap.blocks == ["encoder.0", "encoder.1"]
    for i, a in enumerate(overlap.languages):
        for j, b in enumerate(overlap.languages):
            expected = masks.iou(f"{a}-{PIVOT}", f"{b}-{PIVOT}")
            assert overlap.iou[0, i, j] == pytest.approx(expected["encoder.0"])
    assert neuron_overlap(masks, "decoder", PIVOT).blocks == ["decoder.0"]
    with pytest.raises(ValueError, match=f"directions into Aa; these masks have 1 \\({PIVOT}-Aa of"):
        neuron_overlap(masks, "encoder", "Aa")


def test_known_relations_are_found_and_shuffled_ones_are_not(related):
    toy, masks = related
    overlap = neuron_overlap(masks, "encoder", PIVOT)
    distances = np.array([[toy.distance(a, b) for b in overlap.languages] for a in overlap.languages])
    family = [toy.family[code] for code in overlap.languages]
    rows = overlap_rows(overlap, distances, family, permutations=999)
    for row in rows:
        assert row["within"] > row["across"] and row["rho"] < -0.5 and row["p"] < 0.05, row
    shuffled = np.random.default_rng(0).permutation(len(distances))
    for row in overlap_rows(overlap, distances[np.ix_(shuffled, shuffled)], permutations=999):
        assert row["p"] > 0.05 and abs(row["rho"]) < 0.5, row


def test_mantel_is_spearman_over_pairs_and_counts_orders():
    draw = np.random.default_rng(0)
    points = draw.random((7, 2))
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    overlap = 1 - distances + 0.1 * draw.random()
    found = mantel(overlap, distances)
    upper = np.triu_indices(7, 1)
    assert found["rho"] == pytest.approx(spearmanr(overlap[upper], distances[upper]).statistic)
    assert found["p"] == pytest.approx(2 / 5040), "of all orders of seven, only the given one is as extreme"
    assert mantel(overlap[:6, :6], distances[:6, :6])["p"] is None
    with pytest.raises(ValueError, match="same three or more languages"):
        mantel(overlap, distances[:6, :6])


def test_what_a_third_distance_explains_is_taken_out():
    draw = np.random.default_rng(3)
    script = (lambda s: (s[:, None] != s).astype(float))(np.array([0, 0, 0, 0, 1, 1, 1, 1]))
    noise = draw.random((8, 8)) * 0.01
    overlap = -script + noise + noise.T
    distances = script + (lambda m: m + m.T)(draw.random((8, 8)) * 0.01)
    plain, partial = mantel(overlap, distances), mantel(overlap, distances, [script])
    assert plain["rho"] < -0.6 and plain["p"] < 0.05
    assert abs(partial["rho"]) < 0.4 and partial["p"] > 0.05


def test_holm_corrects_from_the_smallest_up():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.6]) == [1.0, 1.0] and holm([]) == []


def test_distances_of_real_languages_from_any_code():
    codes = ["en", "deu_Latn", "nob", "zho_Hans", "fi"]
    genetic = language_distances(codes)
    assert np.array_equal(genetic, genetic.T) and not genetic.diagonal().any()
    assert genetic[0, 1] < genetic[0, 3] and genetic[1, 2] < genetic[1, 4] == 1
    assert families(codes) == ["Germanic", "Germanic", "Germanic", "Sinitic", "Uralic"]
    assert script_distances(codes)[0].tolist() == [0, 0, 0, 1, 0]
    assert language_distances(["fr", "es"], "syntactic")[0, 1] == pytest.approx(0.1566)
    with pytest.raises(ValueError, match="no language 'xx'; it has en, de"):
        language_distances(["en", "xx"])
    with pytest.raises(ValueError, match="kind must be one of genetic"):
        language_distances(["en"], "typological")
