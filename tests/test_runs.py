"""Runs: resumed as themselves or refused, finished once, and never mixed up with another."""

import json
import logging
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

import neuron_specialization as ns
from neuron_specialization.translation.checkpoints import load_checkpoint
from neuron_specialization.translation.encoding import encode_parallel
from neuron_specialization.translation.results import report_training, write_results
from neuron_specialization.translation.runs import COMPLETE_MARKER, RUN_FILE, last_complete_checkpoint
from neuron_specialization.translation.tokenization import resolve_tokens
from neuron_specialization.translation.trainer import SpecializationTrainer
from neuron_specialization.translation.training import fit

from .test_training import arguments, toy_masks, weights, with_dropout

RUN = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "learning_rate": 1e-3, "save_total_limit": 3}


def content(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def train(toy_data, toy_checkpoint):
    """Train a fresh adapter on the toy checkpoint; returns it and what `fit` returned."""

    def run(directory, k=0.3, trainable="delta", pairs=None, sentences=300, seed=None, dropout=0.1, **changes):
        model, tokenizer = load_checkpoint(str(toy_checkpoint))
        with_dropout(model)
        model.config.dropout = dropout
        config = {"masks": toy_masks(model, tokenizer, toy_data, k), "trainable": trainable}
        if seed is not None:
            torch.manual_seed(seed)
            model.get_input_embeddings().weight.data.normal_()
        model = get_peft_model(model, ns.NeuronSpecializationConfig(**config, task_type="SEQ_2_SEQ_LM"))
        pairs = pairs or list(toy_data["train"])
        data = {pair: toy_data["train"][pair].select(range(sentences)) for pair in pairs}
        held_out = {pair: toy_data["validation"][pair] for pair in pairs}
        return model, fit(model, tokenizer, data, held_out, arguments(directory, **{**RUN, **changes}))

    return run


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """The directory of a finished run."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    train(directory)
    return directory


@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1e-4}, r"learning_rate was 0.001, now 0.0001"),
        ({"max_steps": 6}, r"max_steps was 4, now 6"),
        ({"gradient_accumulation_steps": 2}, r"batches per update \(.*\) was 1, now 2"),
        ({"pairs": ["Pv-Aa", "Aa-Pv"]}, r'language_pairs was \["Pv-Aa", .*, now \["Pv-Aa", "Aa-Pv"\]'),
        ({"trainable": "full"}, r'adapter default: trainable was "delta", now "full"'),
        ({"k": 0.6}, r'masks was "[0-9a-f]+", now "'),
        ({"sentences": 200}, r'training data was "1200 sentence pairs, digest .*, now "800 sentence pairs'),
        ({"dataloader_drop_last": True}, r"dataloader_drop_last was false, now true"),  # which evaluates on less
        ({"dropout": 0.3}, r"model dropout was 0.1, now 0.3"),
        ({"seed": 3}, r'model weights was "[0-9a-f]+", now "'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_with_other_settings_is_refused(train, finished, tmp_path, changes, message, unfinished):
    """It would go on with one and record the other; the way out is named, and nothing is touched."""
    shutil.copytree(finished, tmp_path / "run")
    if unfinished:
        run = json.loads((tmp_path / "run" / RUN_FILE).read_text())
        (tmp_path / "run" / RUN_FILE).write_text(json.dumps({**run, "result": None}))
    before = content(tmp_path / "run")
    with pytest.raises(ValueError, match=f"{message}.*another --output_dir, or .*--overwrite_output_dir"):
        train(tmp_path / "run", **changes)
    assert content(tmp_path / "run") == before


def test_a_finished_run_says_so_and_changes_nothing(train, finished, tmp_path, capsys):
    """Even where it was moved, and where what is logged, and with how many workers, differs."""
    shutil.copytree(finished, tmp_path / "moved")
    results = write_results(tmp_path / "moved", {"made": "by the first run"})
    before = content(tmp_path / "moved")
    model, metrics = train(tmp_path / "moved", logging_steps=2, save_total_limit=1, dataloader_num_workers=1)
    report_training(tmp_path / "moved", metrics, [])
    assert metrics["updates"] == 4 and metrics["saved"] == str(tmp_path / "moved" / "adapter")
    assert content(tmp_path / "moved") == before, "results.json too"
    assert "finished after 4 updates" in (printed := capsys.readouterr().out) and f"kept {results.parent}" in printed
    fresh = train(tmp_path / "again")[0]
    assert all(weight.equal(weights(fresh)[name]) for name, weight in weights(model).items()), "it is the trained one"


def test_the_seconds_of_a_resumed_run_add_up(train, finished, tmp_path):
    """What a comparison counts as cost is not that of the last piece alone."""
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    run = json.loads((directory / RUN_FILE).read_text())
    (directory / RUN_FILE).write_text(json.dumps({**run, "result": None}))
    shutil.rmtree(directory / "checkpoint-4")
    marker = directory / "checkpoint-2" / COMPLETE_MARKER
    written = json.loads(marker.read_text())
    assert 0 < written["seconds"] < run["result"]["train_runtime"]
    marker.write_text(json.dumps({**written, "seconds": 1000.0}))
    assert 1000 < train(directory)[1]["train_runtime"] < 2000
    assert json.loads((directory / "checkpoint-4" / COMPLETE_MARKER).read_text())["seconds"] > 1000


def test_the_seconds_do_not_count_what_is_measured_before_the_first_update(train, tmp_path, monkeypatch):
    """Models with masks are measured twice, dense ones once, and both are compared by their seconds."""
    measure = SpecializationTrainer.validation_loss

    clock: list[float] = []

    def slowly(self):
        clock.append(30)
        return measure(self)

    monkeypatch.setattr(SpecializationTrainer, "validation_loss", slowly)
    began = time.perf_counter()
    monkeypatch.setattr(time, "perf_counter", lambda real=time.perf_counter: real() + sum(clock))
    monkeypatch.setattr(time, "time", lambda real=time.time: real() + sum(clock))
    seconds = train(tmp_path)[1]["train_runtime"]
    marked = json.loads((tmp_path / "checkpoint-4" / COMPLETE_MARKER).read_text())["seconds"]
    assert clock == [30, 30] and 0 < marked < seconds < time.perf_counter() - began - 60


def test_patience_counts_on_where_a_run_was_interrupted(train, tmp_path):
    """A learning rate of next to nothing: no validation after the first is better by anything that counts."""
    settings = {"max_steps": 20, "eval_steps": 1, "save_steps": 1, "learning_rate": 1e-30, "patience": 3}
    settings["save_total_limit"] = 9
    whole = train(tmp_path / "whole", **settings)[1]
    assert whole["updates"] == 4
    for left in (2, 3, 4):  # checkpoints; after the last the run had come to its end, and was not saved yet
        directory = tmp_path / f"left-{left}"
        shutil.copytree(tmp_path / "whole", directory)
        run = json.loads((directory / RUN_FILE).read_text())
        (directory / RUN_FILE).write_text(json.dumps({**run, "result": None}))
        for step in range(left + 1, 5):
            shutil.rmtree(directory / f"checkpoint-{step}", ignore_errors=True)
        resumed = train(directory, **settings)[1]
        assert (resumed["updates"], resumed["best_step"]) == (4, 1), left


def test_overwriting_discards_the_run_and_nothing_else(train, finished, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    for notes in (directory / "notes.txt", directory / "adapter" / "notes.txt", directory / "checkpoint-x" / "a"):
        notes.parent.mkdir(exist_ok=True)
        notes.write_text("mine")
    write_results(directory, {"made": "by the first run"})
    metrics = train(directory, learning_rate=1e-4, overwrite_output_dir=True)[1]
    assert not metrics["finished_before"] and not (directory / "results.json").exists()
    assert (directory / "notes.txt").read_text() == (directory / "adapter" / "notes.txt").read_text() == "mine"
    assert (directory / "checkpoint-x" / "a").read_text() == "mine"
    assert json.loads((directory / RUN_FILE).read_text())["depends_on"]["learning_rate"] == 1e-4


def test_a_run_does_not_replace_what_is_not_its_own(toy_data, toy_tokenizer, toy_model, tmp_path):
    toy_model.save_pretrained(tmp_path / "model")
    toy_tokenizer.save_pretrained(tmp_path / "model")
    model, tokenizer = load_checkpoint(str(tmp_path / "model"))
    before = content(tmp_path)
    with pytest.raises(ValueError, match="model already holds config.*did not write there.*--overwrite_output_dir"):
        fit(model, tokenizer, toy_data["train"], None, arguments(tmp_path))
    with pytest.raises(ValueError, match="would remove the model that is to be trained"):
        fit(model, tokenizer, toy_data["train"], None, arguments(tmp_path, overwrite_output_dir=True))
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["checkpoint-1/model.safetensors", "checkpoint-900/x", "run.json"])
def test_checkpoints_of_somebody_else_are_left_alone(toy_data, toy_tokenizer, toy_model, tmp_path, name):
    """The Trainer would count them among its own, and remove the oldest."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"holds .*{name.split('/')[0]}.*no run.json of a training run"):
        fit(toy_model, toy_tokenizer, toy_data["train"], None, arguments(tmp_path))
    assert content(tmp_path) == {str(tmp_path / name): b"{}"}


@pytest.mark.parametrize("kept", [0, 20])
@pytest.mark.parametrize(
    "damaged", ["complete.json", "adapter_model.safetensors", "scheduler.pt", "optimizer.pt", "trainer_state.json"]
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(train, finished, tmp_path, damaged, kept, capsys):
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    assert last_complete_checkpoint(str(directory)) == str(directory / "checkpoint-4")
    file = directory / "checkpoint-4" / damaged
    file.write_bytes(file.read_bytes()[:kept])
    assert last_complete_checkpoint(str(directory)) == str(directory / "checkpoint-2")
    assert f"not resuming from {directory / 'checkpoint-4'}: " in capsys.readouterr().out
    if damaged.endswith(".json"):  # of the right size, with nothing in it: after a power cut, or by another program
        for content in ("{}", "[]", "null", '{"bytes": 3}', "\0"):
            size = (finished / "checkpoint-4" / damaged).stat().st_size
            file.write_text(content.ljust(size, "\0" if content == "\0" else " "))
            assert last_complete_checkpoint(str(directory)) == str(directory / "checkpoint-2"), content
    if damaged == "scheduler.pt" and kept == 0:
        run = json.loads((directory / RUN_FILE).read_text())
        (directory / RUN_FILE).write_text(json.dumps({**run, "result": None}))
        model = train(directory)[0]
        assert "resuming from step 2\n" in capsys.readouterr().out
        fresh = train(tmp_path / "again")[0]
        assert all(weight.equal(weights(fresh)[name]) for name, weight in weights(model).items())


def test_a_checkpoint_whose_best_one_is_damaged_is_not_resumed(finished, tmp_path):
    """It would end with another model than the best."""
    shutil.copytree(finished, tmp_path / "run")
    state = tmp_path / "run" / "checkpoint-4" / "trainer_state.json"
    text = state.read_text()
    best = json.loads(text)["best_model_checkpoint"]
    same_size = best.replace("checkpoint-4", "checkpoint-2")
    state.write_text(text.replace(json.dumps(best), json.dumps(same_size)))
    assert last_complete_checkpoint(str(tmp_path / "run")).endswith("checkpoint-4")
    (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"")
    assert last_complete_checkpoint(str(tmp_path / "run")) is None


def test_losses_before_training_are_of_the_base_and_under_the_masks(train, toy_data, toy_checkpoint, tmp_path, capsys):
    model, metrics = train(tmp_path / "run", eval_steps=1, learning_rate=1e-12)
    losses = {name: metrics[name] for name in ("base_validation_loss", "masked_validation_loss")}
    assert losses["base_validation_loss"] != pytest.approx(losses["masked_validation_loss"], abs=1e-3)
    assert losses["masked_validation_loss"] == pytest.approx(metrics["best_validation_loss"], abs=1e-5)
    assert f"base validation loss {losses['base_validation_loss']:.4f}, masked" in capsys.readouterr().out
    base, tokenizer = load_checkpoint(str(toy_checkpoint))
    tokens = resolve_tokens(tokenizer, toy_data["validation"])
    data = encode_parallel(toy_data["validation"], tokenizer, tokens, max_length=128)
    tags = tokenizer.convert_tokens_to_ids(list(tokens.values()))
    options = tokenizer, data, data, list(toy_data["train"])
    trainer = SpecializationTrainer(base, arguments(tmp_path / "b"), *options, target_tags=tags)
    assert losses["base_validation_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)
    first = metrics["log"][0]["loss"]
    model, tokenizer = load_checkpoint(str(toy_checkpoint))
    model = get_peft_model(
        with_dropout(model),
        ns.NeuronSpecializationConfig(masks=toy_masks(model, tokenizer, toy_data, 0.3), task_type="SEQ_2_SEQ_LM"),
    )
    alone = fit(model, tokenizer, toy_data["train"], None, arguments(tmp_path / "alone", learning_rate=1e-12))
    assert first == alone["log"][0]["loss"], "measuring first changes nothing"


def test_a_run_makes_no_noise(toy_data, toy_tokenizer, toy_model, tmp_path, caplog, recwarn):
    with transformers_logs(caplog):
        metrics = fit(
            *(toy_model, toy_tokenizer, toy_data["train"], toy_data["validation"]),
            arguments(tmp_path, max_steps=2, eval_steps=1, use_cpu=False),  # as users leave it, also on a CPU
        )
    assert not any("epoch" in entry for entry in metrics["log"])
    assert [record.message for record in caplog.records if "filesystem" not in record.message] == []
    assert [str(warning.message) for warning in recwarn] == []


@contextmanager
def transformers_logs(caplog):
    """Let warnings of transformers reach pytest."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
