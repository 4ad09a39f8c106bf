"""Overlap of neurons against the distance of languages: known relations are found, and shuffled ones are not."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from neuron_specialization.analysis.agreement import comparable_pairs, mask_agreement, mean_agreement
from neuron_specialization.analysis.distances import (
    families,
    label_distances,
    language_distances,
    load_distances,
    scripts,
    subword_distances,
)
from neuron_specialization.analysis.overlap import Overlap, holm, mantel, neuron_overlap, overlap_rows
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


def test_a_default_pair_is_not_compared(related):
    _, masks = related
    listed = {**masks.routes.listed, "default": (0, 0)}
    with_default = replace(masks, routes=replace(masks.routes, listed=listed))
    found, expected = (neuron_overlap(each, "encoder", PIVOT) for each in (with_default, masks))
    assert found.languages == expected.languages and np.array_equal(found.iou, expected.iou)


def test_known_relations_are_found_and_shuffled_ones_are_not(related):
    toy, masks = related
    overlap = neuron_overlap(masks, "encoder", PIVOT)
    distances = np.array([[toy.distance(a, b) for b in overlap.languages] for a in overlap.languages])
    family = [toy.family[code] for code in overlap.languages]
    rows = overlap_rows(overlap, distances, family, permutations=999)
    for row in rows:
        assert row["within"] > row["across"] and row["rho"] < -0.5 and row["p"] < 0.05, row
    alone = overlap_rows(overlap, distances, overlap.languages, permutations=9)
    assert {row["within"] for row in alone} == {None}, "no NaN, which JSON does not know"
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
    with pytest.raises(ValueError, match="matrices of the same languages"):
        mantel(overlap, distances[:6, :6])
    with pytest.raises(ValueError, match="3 languages at least, 7 for a p-value; got 2"):
        mantel(overlap[:2, :2], distances[:2, :2])


def test_what_a_third_distance_explains_is_taken_out():
    draw = np.random.default_rng(3)
    script = (lambda s: (s[:, None] != s).astype(float))(np.array([0, 0, 0, 0, 1, 1, 1, 1]))
    noise = draw.random((8, 8)) * 0.01
    overlap = -script + noise + noise.T
    distances = script + (lambda m: m + m.T)(draw.random((8, 8)) * 0.01)
    plain, partial = mantel(overlap, distances), mantel(overlap, distances, [script])
    assert plain["rho"] < -0.6 and plain["p"] < 0.05
    assert abs(partial["rho"]) < 0.4 and partial["p"] > 0.05


def test_nothing_is_told_where_a_third_distance_explains_everything():
    draw = np.random.default_rng(0)
    overlap, distances, other = (m + m.T for m in draw.random((3, 8, 8)))
    for same in (distances, 3 * distances, distances**3):
        assert mantel(overlap, distances, [same]) == {"rho": None, "p": None}
        assert mantel(overlap, distances, [other, same]) == {"rho": None, "p": None}
    assert mantel(1 - distances, other, [distances]) == {"rho": None, "p": None}
    assert mantel(np.ones((8, 8)), distances) == {"rho": None, "p": None}
    few = mantel(overlap[:6, :6], distances[:6, :6], [distances[:6, :6]])
    assert few == {"rho": None, "p": None} and mantel(overlap, distances, [other])["p"] is not None
    (row,) = overlap_rows(Overlap("encoder", [*"abcdefgh"], ["fc1"], overlap[None]), distances, None, {"x": distances})
    assert row["partial rho"] is row["partial p"] is None and row["p"] is not None


def test_holm_corrects_from_the_smallest_up():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.6]) == [1.0, 1.0] and holm([]) == []


def test_distances_of_real_languages_from_any_code():
    codes = ["en", "deu_Latn", "nob", "zho_Hans", "fi"]
    genetic = language_distances(codes)
    assert np.array_equal(genetic, genetic.T) and not genetic.diagonal().any()
    assert genetic[0, 1] < genetic[0, 3] and genetic[1, 2] < genetic[1, 4] == 1
    assert families(codes) == ["Germanic", "Germanic", "Germanic", "Sinitic", "Uralic"]
    assert label_distances(scripts(codes))[0].tolist() == [0, 0, 0, 1, 0]
    assert language_distances(["fr", "es"], "syntactic")[0, 1] == pytest.approx(0.1566)
    with pytest.raises(ValueError, match="no language 'xx'; it has en, de"):
        language_distances(["en", "xx"])
    with pytest.raises(ValueError, match="kind must be one of genetic"):
        language_distances(["en"], "typological")


def test_distances_come_from_the_table_from_a_file_or_from_urielplus(tmp_path):
    assert np.array_equal(load_distances(["fr", "es"], "syntactic"), language_distances(["fr", "es"], "syntactic"))
    own = tmp_path / "own.csv"
    own.write_text("a,b,distance\nAb,Aa,0.25\nAa,Ba,1\nBa,Ab,0.5\n")
    assert load_distances(["Aa", "Ab", "Ba"], str(own)).tolist() == [[0, 0.25, 1], [0.25, 0, 0.5], [1, 0.5, 0]]
    with pytest.raises(ValueError, match="no distance between Aa and Bb"):
        load_distances(["Aa", "Bb"], str(own))
    for wrong in ("", "0,5", "nan"):
        own.write_text(f'a,b,distance\nAb,Aa,"{wrong}"\n')
        with pytest.raises(ValueError, match=f"no number for Ab and Aa: '{wrong}'"):
            load_distances(["Aa", "Ab"], str(own))
    own.write_text("a,b,genetic\n")
    with pytest.raises(ValueError, match="expected a, b and distance"):
        load_distances(["Aa", "Ab"], str(own))


def test_distances_of_urielplus():
    pytest.importorskip("urielplus", reason="the optional package urielplus is not installed")
    found = load_distances(["en", "deu_Latn", "tgl"], "urielplus:genetic")
    assert np.array_equal(found, found.T) and not found.diagonal().any() and found[0, 1] < found[0, 2] == 1
    with pytest.raises(ValueError, match="URIEL\\+ does not know xxq"):
        load_distances(["en", "xxq"], "urielplus:genetic")


def test_urielplus_that_is_missing_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "urielplus.urielplus", None)
    with pytest.raises(ImportError, match="pip install urielplus"):
        load_distances(["en", "de"], "urielplus:genetic")


def test_subword_distance_is_what_two_texts_do_not_share():
    found = subword_distances([[1, 1, 2, 3], [1, 2, 2, 9], [7, 7], [1, 1, 2, 3] * 2])
    assert found[0].tolist() == pytest.approx([0, 0.5, 1, 0])


def test_masks_of_the_same_neurons_agree_with_their_own_pair_only(related):
    toy, masks = related
    same = mask_agreement(masks, masks)
    assert [(row["stack"], row["layer"]) for row in same] == [("encoder", 0), ("encoder", 1), ("decoder", 0)]
    for row in same:
        assert row["own"] == row["lowest"] == 1 > row["others"] > row["chance"] and row["pairs"] == 8
    pairs = masks.language_pairs
    into = [pair for pair in pairs if pair.endswith(f"-{PIVOT}")]
    by_hand = [masks.iou(a, b)["encoder.0"] for a in into for b in into if a != b]
    assert same[0]["others"] == pytest.approx(np.mean(by_hand))
    rows = {name: rows[:, torch.randperm(400)] for name, rows in masks.rows.items()}
    for row in mask_agreement(masks, NeuronMasks(rows, BLOCKS, Routes.per_pair(pairs))):
        assert row["own"] == pytest.approx(row["chance"], abs=0.05), "other neurons agree by chance"
    averaged = mean_agreement([{"masks": "m", **row} for row in [*same, *({**r, "own": 0.5} for r in same)]])
    assert len(averaged) == 3 and averaged[0]["own"] == 0.75 and averaged[0]["times"] == 2


def test_agreement_needs_a_pair_in_common_and_the_same_blocks(related):
    _, masks = related
    other = replace(masks, routes=Routes.per_pair([f"x{i}-y" for i in range(16)]))
    with pytest.raises(ValueError, match="share no language pair"):
        mask_agreement(masks, other)
    with pytest.raises(ValueError, match="different models"):
        mask_agreement(masks, replace(masks, rows={name: rows[:, :9] for name, rows in masks.rows.items()}))


def test_comparable_pairs_differ_in_the_side_that_the_stack_sees():
    pairs = ["en-de", "en-fr", "de-en", "fr-en", "de-fr"]
    assert comparable_pairs(pairs, "encoder") == {
        "en-fr": ["de-fr"],
        "de-en": ["fr-en"],
        "fr-en": ["de-en"],
        "de-fr": ["en-fr"],
    }
    assert comparable_pairs(pairs, "decoder")["de-en"] == ["de-fr"]


def test_analyze_finds_the_known_distances_in_trained_masks_and_not_in_others(
    related, run_here, toy_checkpoint, tmp_path
):
    toy, masks = related
    masks.save_pretrained(tmp_path / "trained")
    shuffled = {
        name: rows[torch.randperm(16, generator=torch.Generator().manual_seed(3))] for name, rows in masks.rows.items()
    }
    replace(masks, rows=shuffled).save_pretrained(tmp_path / "untrained")
    codes = toy.languages[1:]
    pairs = [(a, b) for a in codes for b in codes if a < b]
    (tmp_path / "distances.csv").write_text(
        "a,b,distance\n" + "".join(f"{a},{b},{toy.distance(a, b)}\n" for a, b in pairs)
    )
    toy.sentences(30, "validation").to_json(tmp_path / "validation.jsonl")
    run_here(
        *("analyze.py", "--overlap", "--output_dir", str(tmp_path / "out"), "--pivot", PIVOT, "--permutations", "999"),
        *("--masks", f"trained={tmp_path / 'trained'}", f"untrained={tmp_path / 'untrained'}"),
        *("--distances", str(tmp_path / "distances.csv"), "--families", *(f"{c}={toy.family[c]}" for c in codes)),
        *("--scripts", *(f"{c}=Latin" for c in codes), "--tiers", *(f"{c}={c[1]}" for c in codes)),
        *("--tokenizer", str(toy_checkpoint), "--validation_file", str(tmp_path / "validation.jsonl")),
        *("--report", str(tmp_path / "report.html")),
    )
    assert (tmp_path / "report.html").read_text().count("data:image/svg+xml") == 3
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(found["encoder"]["controlled"]) == ["tier", "subwords"], "one script leaves nothing to control for"
    assert np.array(found["encoder"]["iou"]["trained"]).shape == (2, 8, 8)
    trained, other = ([row for row in found["overlap"] if row["masks"] == name] for name in ("trained", "untrained"))
    assert [row["stack"] for row in trained] == ["encoder", "encoder", "decoder"]
    assert all(row["rho"] < -0.5 and row["p"] < 0.05 and row["within"] > row["across"] for row in trained)
    assert all(row["p"] > 0.05 for row in other) and "partial rho" in other[0]
    assert {path.name for path in (tmp_path / "out").glob("*.svg")} == {
        f"overlap-{name}.svg" for name in ("encoder", "decoder", "depth")
    }
    one_to_many = [pair for pair in masks.language_pairs if pair.startswith(f"{PIVOT}-")]
    places = [masks.language_pairs.index(pair) for pair in one_to_many]
    rows = {name: rows[places] for name, rows in masks.rows.items()}
    replace(masks, rows=rows, routes=Routes.per_pair(one_to_many)).save_pretrained(tmp_path / "one-to-many")
    words = ("--overlap", "--pivot", PIVOT, "--masks", f"trained={tmp_path / 'one-to-many'}", "--permutations", "9")
    words += ("--distances", str(tmp_path / "distances.csv"), "--families", *(f"{c}={toy.family[c]}" for c in codes))
    words += ("--scripts", *(f"{c}=Latin" for c in codes), "--output_dir", str(tmp_path / "half"))
    assert f"directions into {PIVOT}; these masks have 0" in run_here("analyze.py", *words)
    found = json.loads((tmp_path / "half" / "results.json").read_text())
    assert {row["stack"] for row in found["overlap"]} == {"decoder"} and "encoder" not in found
    assert {path.stem for path in (tmp_path / "half").glob("*.svg")} == {"overlap-decoder", "overlap-depth"}
    assert "Say what to do: --overlap" in run_here("analyze.py", "--output_dir", str(tmp_path / "out"), fails=True)
