"""Directions that no stage trains: composed, scored from kept models, and told apart from other languages."""

import copy
import dataclasses
import json
import shutil

import pytest
from peft import get_peft_model

import neuron_specialization as ns
from neuron_specialization.baselines.collected import collect
from neuron_specialization.baselines.methods import masks_of
from neuron_specialization.baselines.stages import PART
from neuron_specialization.baselines.zero_shot import ZERO_SHOT, ZeroShot, ZeroShotArguments, collect_zero_shot
from neuron_specialization.translation.checkpoints import load_checkpoint
from neuron_specialization.translation.data import load_parallel
from neuron_specialization.translation.off_target import identified, language_identifier, off_target_rate
from neuron_specialization.translation.results import write_results
from neuron_specialization.translation.token_loss import token_losses

from .test_baselines import make_comparison

UNSEEN = ["Aa-Ba", "Ba-Aa"]


@pytest.fixture(scope="module")
def unseen(toy_files):
    data = load_parallel(str(toy_files / "test.jsonl"), UNSEEN)
    return {pair: rows.select(range(6)) for pair, rows in data.items()}


@pytest.fixture(scope="module")
def stages(toy_checkpoint, toy_data, tmp_path_factory):
    """The directory of finished stages, one of each kind."""
    directory = tmp_path_factory.mktemp("comparison")
    comparison = make_comparison(*load_checkpoint(str(toy_checkpoint)), toy_data, directory)
    comparison.training.max_steps = 1
    for method in ("masks_only", "fine_tune", "ours", "ffn_copies", "lora"):
        assert comparison.run(method, 0), method
    write_results(comparison.stage_directory("fine_tune_single", 0) / "Pv-Aa", {}, PART)
    return directory


@pytest.fixture
def zero_shot(stages, toy_checkpoint, toy_data, unseen, tmp_path):
    shutil.copytree(stages, tmp_path, dirs_exist_ok=True)
    comparison = make_comparison(*load_checkpoint(str(toy_checkpoint)), toy_data, tmp_path)
    return ZeroShot(comparison, unseen, ZeroShotArguments(zero_shot_pairs=UNSEEN))


def test_masks_are_composed_and_models_without_them_run_as_they_are(zero_shot, unseen):
    for method in ("masks_only", "fine_tune", "ours", "ffn_copies", "lora", "fine_tune_single", "union"):
        zero_shot.score(method, 0)
    found = collect_zero_shot(zero_shot.comparison.directory)
    rows = {(row["method"], row["direction"], row["route"]): row for row in found["rows"]}
    composable = ("masks_only", "fine_tune", "ours", "ffn_copies", "lora")
    assert {key[:2] for key in rows} == {(method, pair) for method in composable for pair in UNSEEN}
    assert found["not_applicable"] == {
        "fine_tune_single": "fine_tune_single has a model for each trained direction, and none for others."
    }
    comparison = zero_shot.comparison
    model, tokenizer = comparison.baseline, comparison.tokenizer
    masks = masks_of("masks_only", comparison.counts(), comparison.method, "Pv", 0)
    block = next(name for name, stack in masks.stacks.items() if stack == "decoder")
    composed = masks.compose("Aa-Ba")
    assert composed.row("Aa-Ba", block).equal(masks.row("Pv-Ba", block))
    config = ns.NeuronSpecializationConfig(masks=composed, trainable="none", task_type="SEQ_2_SEQ_LM")
    by_hand = token_losses(get_peft_model(copy.deepcopy(model), config), tokenizer, unseen)
    dense = token_losses(model, tokenizer, unseen)
    row = rows["masks_only", "Aa-Ba", "direct"]
    assert row["loss"] == pytest.approx(by_hand["Aa-Ba"]) and row["loss"] != pytest.approx(dense["Aa-Ba"], rel=1e-4)
    final = comparison.final_model("fine_tune", 0)
    assert rows["fine_tune", "Ba-Aa", "direct"]["loss"] == pytest.approx(
        token_losses(final, tokenizer, unseen)["Ba-Aa"]
    )
    assert all("off_target" not in row for row in found["rows"]), "no identifier knows artificial languages"
    through = rows["fine_tune", "Aa-Ba", "pivot"]
    assert through["loss"] is None and ("ours", "Aa-Ba", "pivot") not in rows
    stored = json.loads((comparison.stage_directory("fine_tune", 0) / ZERO_SHOT).read_text())["scored"]["pivot"]
    options = {"num_beams": 1, "batch_size": 16}
    middle = ns.translate(final, tokenizer, unseen["Aa-Ba"]["source"], "Aa-Pv", **options)
    assert stored["Aa-Ba"]["translations"] == ns.translate(final, tokenizer, middle, "Pv-Ba", **options)


def test_scoring_goes_on_where_it_was_and_follows_a_stage_that_was_run_again(zero_shot):
    path = zero_shot.comparison.stage_directory("masks_only", 0) / ZERO_SHOT
    zero_shot.score("masks_only", 0)
    written = json.loads(path.read_text())
    del written["scored"]["direct"]["Ba-Aa"]
    written["scored"]["direct"]["Aa-Ba"]["result"]["bleu"] = -1.0
    path.write_text(json.dumps(written))
    zero_shot.score("masks_only", 0)
    rows = {row["direction"]: row for row in collect_zero_shot(zero_shot.comparison.directory)["rows"]}
    assert rows["Aa-Ba"]["bleu"] == -1 and rows["Ba-Aa"]["bleu"] >= 0, "the first was not scored again"
    part = path.with_name(PART)
    part.write_text(part.read_text() + " ")
    zero_shot.score("masks_only", 0)
    rows = {row["direction"]: row for row in collect_zero_shot(zero_shot.comparison.directory)["rows"]}
    assert rows["Aa-Ba"]["bleu"] >= 0, "the stage is another one now"
    written = json.loads(path.read_text())
    written["scored"]["direct"]["Aa-Ba"]["result"]["bleu"] = -1.0
    path.write_text(json.dumps(written))
    codes = dataclasses.replace(zero_shot.args, identifier_codes=["Aa=de", "Ba=fr", "Pv=en"])
    dataclasses.replace(zero_shot, args=codes).score("masks_only", 0)
    row = next(r for r in collect_zero_shot(zero_shot.comparison.directory)["rows"] if r["direction"] == "Aa-Ba")
    assert row["bleu"] >= 0 and row["off_target"] is not None, "now their languages can be told"


def test_a_model_that_was_not_kept_is_said_and_scored_once_it_is_back(zero_shot, tmp_path):
    directory = zero_shot.comparison.stage_directory("ours", 0)
    (directory / "adapter").rename(tmp_path / "elsewhere")
    zero_shot.score("ours", 0)
    found = collect_zero_shot(zero_shot.comparison.directory)
    assert not found["rows"] and "was not kept in" in found["not_applicable"]["ours"]
    (tmp_path / "elsewhere").rename(directory / "adapter")
    zero_shot.score("ours", 0)
    found = collect_zero_shot(zero_shot.comparison.directory)
    assert len(found["rows"]) == 2 and not found["not_applicable"]


def test_a_direction_that_fails_is_said_and_what_does_not_apply_is_no_failure(zero_shot, monkeypatch, capsys):
    assert zero_shot.score("fine_tune_single", 0) == []
    right = zero_shot._direct

    def breaks(model, pair):
        if pair == "Ba-Aa":
            raise MemoryError("none left")
        return right(model, pair)

    monkeypatch.setattr(zero_shot, "_direct", breaks)
    assert zero_shot.score("masks_only", 0) == ["masks_only, seed 0, Ba-Aa (MemoryError: none left)"]
    assert "FAILED: MemoryError: none left" in capsys.readouterr().out


def test_a_copy_of_a_stage_is_none(zero_shot):
    zero_shot.score("masks_only", 0)
    stage = zero_shot.comparison.stage_directory("masks_only", 0)
    shutil.copytree(stage, stage.with_name("seed-0-old"))
    shutil.rmtree(stage.parents[1] / "fine_tune_single")  # whose part is a stand-in
    assert {row["seed"] for row in collect_zero_shot(zero_shot.comparison.directory)["rows"]} == {0}
    assert {s["seed"] for s in collect(zero_shot.comparison.directory)["stages"]} == {0}


def test_directions_that_are_trained_or_of_other_languages_are_refused(zero_shot, unseen):
    for wrong in ("Pv-Aa", "Aa-Zz"):
        with pytest.raises(ValueError, match=f"{wrong} is no zero-shot direction"):
            dataclasses.replace(zero_shot, data={wrong: unseen["Aa-Ba"]})


def test_languages_of_translations_are_told_among_those_of_the_comparison():
    identify = language_identifier(["en", "deu_Latn", "fr"], {"deu_Latn": "de"})
    texts = ["Ein Mann fährt mit dem Fahrrad.", "A man rides a bicycle.", "Un homme fait du vélo.", " "]
    found = identified(texts, identify)
    assert found == {"deu_Latn": 1, "en": 1, "fr": 1, "": 1} and off_target_rate(found, "fr") == 0.75
    assert identify("Un hombre monta en bicicleta.") in ("deu_Latn", "en", "fr"), "no other language is ever said"
    with pytest.raises(ValueError, match="cannot tell .* apart: zh=zh, zho_Hant=zh"):
        language_identifier(["zh", "zho_Hant"], {"zho_Hant": "zh"})
    assert language_identifier(["Pv", "Aa"]) is None and language_identifier(["en", "qqq"]) is None


def test_only_a_method_can_go_through_the_pivot(zero_shot, unseen):
    with pytest.raises(ValueError, match="fine_tunes"):
        ZeroShot(zero_shot.comparison, unseen, ZeroShotArguments(pivoted=["fine_tunes"]))
