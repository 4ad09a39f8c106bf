"""`--k auto`: the smallest k whose masks, without training, raise the loss by at most 1 %."""

import copy
import json
import runpy
import sys
from pathlib import Path

import pytest
from peft import get_peft_model

import neuron_specialization as ns
from neuron_specialization.adapter.routing import is_routed
from neuron_specialization.translation.smallest_k import GRID, find_smallest_k, parse_k
from neuron_specialization.translation.token_loss import token_losses
from neuron_specialization.translation.training import fit

from .test_training import arguments, weights

ROOT = Path(__file__).parent.parent


@pytest.fixture
def trained(toy_model, toy_tokenizer, toy_data, tmp_path):
    """A model that has learned something that masks can take away."""
    fit(toy_model, toy_tokenizer, toy_data["train"], None, arguments(tmp_path / "train", max_steps=40))
    return toy_model


@pytest.fixture
def some(toy_data):
    return {pair: rows.select(range(16)) for pair, rows in toy_data["validation"].items()}


def test_the_k_found_is_within_the_tolerance_and_the_next_smaller_one_is_not(trained, toy_tokenizer, some):
    counts = ns.record_corpus(trained, toy_tokenizer, some)
    before, structure = weights(trained), str(trained)
    found = find_smallest_k(trained, toy_tokenizer, some, counts)
    assert str(trained) == structure and not is_routed(trained) and all(p.requires_grad for p in trained.parameters())
    assert all(weight.equal(before[name]) for name, weight in weights(trained).items())

    def loss(k):
        masks = ns.CumulativeThreshold(k).select(counts)
        config = ns.NeuronSpecializationConfig(masks=masks, trainable="none", task_type="SEQ_2_SEQ_LM")
        losses = token_losses(get_peft_model(copy.deepcopy(trained), config), toy_tokenizer, some)
        return sum(losses.values()) / len(losses)

    base = token_losses(trained, toy_tokenizer, some)
    assert found.base_loss == pytest.approx(sum(base.values()) / len(base))
    assert found.losses == {k: pytest.approx(loss(k)) for k in found.losses} and len(found.losses) <= 5
    place = GRID.index(found.k)
    assert 0 < place, "the toy is too easy: every k of the grid will do"
    assert found.losses[found.k] <= 1.01 * found.base_loss < found.losses[GRID[place - 1]]
    again = ns.CumulativeThreshold(found.k).select(counts)
    assert all(rows.equal(found.masks.rows[name]) for name, rows in again.rows.items())
    assert [row["masks"] for row in found.rows()] == [*(f"k = {k}" for k in sorted(found.losses)), "none"]
    stored = found.masks.selector
    assert stored["name"] == "CumulativeThreshold" and stored["k"] == found.k
    assert "at most 1.0% more" in stored["k_rule"] and stored["loss"] == found.losses[found.k]


def test_it_is_an_error_if_no_k_is_within_the_tolerance(trained, toy_tokenizer, some):
    counts = ns.record_corpus(trained, toy_tokenizer, some)
    with pytest.raises(ValueError, match="Even the masks of k=1.0 raise the loss from"):
        find_smallest_k(trained, toy_tokenizer, some, counts, tolerance=-0.5)
    assert not is_routed(trained)


def test_identify_stores_the_k_it_found(toy_checkpoint, toy_files, tmp_path, monkeypatch, capsys):
    words = [
        ROOT / "recipes" / "identify.py",
        "--model_name_or_path",
        toy_checkpoint,
        "--language_pairs",
        "Pv-Aa",
        "Aa-Pv",
    ]
    words += ["--validation_file", toy_files / "validation.jsonl", "--output_dir", tmp_path / "masks", "--k", "auto"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    runpy.run_path(sys.argv[0], run_name="__main__")
    masks = ns.NeuronMasks.from_pretrained(tmp_path / "masks")
    results = json.loads((tmp_path / "masks" / "results.json").read_text())
    assert masks.selector == results["selector"] and masks.selector["k"] in GRID
    printed = capsys.readouterr().out
    assert f"| k = {masks.selector['k']} " in printed and "increase (%)" in printed
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--decoder_k", "0.9"])
    with pytest.raises(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert "one k for both stacks" in capsys.readouterr().err


def test_what_k_may_be():
    assert parse_k("auto") is None and parse_k("0.95") == 0.95
    with pytest.raises(ValueError, match="or 'auto'; got 'most'"):
        parse_k("most")
