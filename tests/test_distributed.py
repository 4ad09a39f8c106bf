"""Several processes: the same weights as one process on the same global batch, counts added up, files written once."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import neuron_specialization as ns
from neuron_specialization.analysis.mass_activation import SUMS, MassActivation
from neuron_specialization.analysis.mass_recording import record_mass
from neuron_specialization.translation.checkpoints import load_checkpoint
from neuron_specialization.translation.data import load_parallel
from neuron_specialization.translation.identification import record_corpus
from neuron_specialization.translation.recording import corpus_batches
from neuron_specialization.translation.runs import last_complete_checkpoint

from .test_recipes import ACCELERATE, CPU, PORT, ROOT, launch_options

SCRIPT = str(Path(__file__).parent / "distributed" / "train.py")
FSDP2 = ["--config_file", str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml"), "--num_processes", "2", *PORT]
DDP, ONE = launch_options(2), launch_options(1)


MODES = ["delta", "low_rank", "full", "gradual", "dense"]


def start(launch, checkpoint, data, masks, modes, output, *options, validation="none", cut_off_after=None) -> None:
    """Train in every mode in turn, by one `accelerate launch`."""
    processes = "1" if launch is ONE else "2"
    arguments = [
        processes,
        str(checkpoint),
        str(data),
        str(validation),
        str(masks),
        modes,
        "--output_dir",
        str(output),
    ]
    arguments += ["--per_device_train_batch_size", "4", "--disable_tqdm", "true"]
    command = [ACCELERATE, "launch", *launch, SCRIPT, *arguments, *options]
    environment = {**os.environ, **CPU, **({} if cut_off_after is None else {"CUT_OFF_AFTER": str(cut_off_after)})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert (done.returncode == 0) == (cut_off_after is None), done.stderr[-4000:]


def train(launch, toy_checkpoint, toy_files, masks, output, accumulation) -> Path:
    options = [
        *("--max_steps", "3", "--gradient_accumulation_steps", str(accumulation), "--learning_rate", "0.1"),
        *("--temperature", "1", "--lr_scheduler_type", "constant", "--weight_decay", "0.1"),
        *("--seed", "0", "--optim", "sgd", "--max_grad_norm", "1"),
    ]
    start(launch, toy_checkpoint, toy_files / "train.jsonl", masks, ",".join(MODES), output, *options)
    return output


def trained(output, mode) -> dict[str, torch.Tensor]:
    kind = "model" if mode == "dense" else "adapter"
    files = sorted(p.name for p in (output / mode).iterdir())
    assert kind in files and not any("partial" in name for name in files)
    return load_file(output / mode / kind / f"{'model' if mode == 'dense' else 'adapter_model'}.safetensors")


@pytest.fixture(scope="module")
def masks(toy_checkpoint, toy_files, toy_data, tmp_path_factory):
    model, tokenizer = load_checkpoint(str(toy_checkpoint))
    directory = tmp_path_factory.mktemp("distributed") / "masks"
    counts = record_corpus(model, tokenizer, toy_data["validation"])
    ns.CumulativeThreshold(0.3).select(counts).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def one_process(toy_checkpoint, toy_files, masks, tmp_path_factory):
    """What one process trains, which accumulates what two processes see at once."""
    return train(ONE, toy_checkpoint, toy_files, masks, tmp_path_factory.mktemp("one"), 2)


@pytest.fixture(scope="module", params=[DDP, FSDP2], ids=["ddp", "fsdp2"])
def two_processes(request, toy_checkpoint, toy_files, masks, tmp_path_factory):
    return train(request.param, toy_checkpoint, toy_files, masks, tmp_path_factory.mktemp("two"), 1)


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_to_the_weights_of_one(mode, one_process, two_processes, toy_checkpoint, masks):
    """In float64: the loss without logits of two processes is that of one process, from logits.

    By SGD, because Adam turns rounding into signs.
    """
    found, expected = trained(two_processes, mode), trained(one_process, mode)
    assert found.keys() == expected.keys()
    start = dict(load_checkpoint(str(toy_checkpoint))[0].double().named_parameters())
    moved = 0.0
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )
        base = name.removeprefix("base_model.model.").replace(".base_layer", "")
        moved = max(moved, (tensor - start[base]).abs().max().item() if base in start else tensor.float().abs().max())
    assert moved > 1e-3
    first, second = (json.loads((two_processes / f"{mode}-written-by-{rank}.json").read_text()) for rank in (0, 1))
    assert any(path.endswith("trainer_state.json") for path in first)
    assert not set(first) & set(second), "each file is written once"
    if mode == "full":
        rows = ns.NeuronMasks.from_pretrained(masks).rows
        for name, mask in rows.items():
            kept = found[f"base_model.model.{name}.base_layer.weight"][~mask.any(0)]
            assert kept.equal(start[f"{name}.weight"][~mask.any(0)]), "rows that no pair selects never move"
    if mode != "dense":
        model, tokenizer = load_checkpoint(str(toy_checkpoint))
        adapted = PeftModel.from_pretrained(model.double(), str(two_processes / mode / "adapter"))
        assert len(ns.translate(adapted, tokenizer, ["ba bu"], "Pv-Aa", max_new_tokens=4)) == 1
    checkpoint = two_processes / mode / "checkpoint-3"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 3
    assert last_complete_checkpoint(str(checkpoint.parent)) == str(checkpoint)


def test_a_sharded_run_is_evaluated_and_resumed(toy_checkpoint, toy_files, masks, tmp_path):
    for cut_off_after in (3, None):
        options = ["--max_steps", "4", "--eval_steps", "2", "--learning_rate", "0.001"]
        start(
            *(FSDP2, toy_checkpoint, toy_files / "train.jsonl", masks, "full", tmp_path, *options),
            validation=toy_files / "validation.jsonl",
            cut_off_after=cut_off_after,
        )
    log = json.loads((tmp_path / "full" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    assert list(losses) == [2, 4] and losses[4] < losses[2]
    before = json.loads((tmp_path / "full" / "run.json").read_text())["initial_losses"]
    assert losses[2] < before["masked_validation_loss"] != before["base_validation_loss"]


def test_mass_adds_up_over_processes_and_some_recipes_run_as_one(toy_checkpoint, toy_files, tmp_path):
    validation = toy_files / "validation.jsonl"
    arguments = [str(each) for each in (ROOT / "recipes", toy_checkpoint, validation, tmp_path)]
    script = str(Path(SCRIPT).with_name("record.py"))
    environment = {**os.environ, **CPU}
    command = [ACCELERATE, "launch", *DDP, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    model, tokenizer = load_checkpoint(str(toy_checkpoint))
    text = load_parallel(str(validation), ["Pv-Aa", "Pv-Ba"])
    text = {"Pv-Aa": text["Pv-Aa"].select(range(40)), "Pv-Ba": text["Pv-Ba"].select(range(6))}
    batches = corpus_batches(model.double(), tokenizer, text, batch_size=8)
    alone = record_mass(model, batches, token_ids=range(100), progress=False)
    for rank in (0, 1):
        mass = MassActivation.load(tmp_path / f"{rank}.safetensors")
        assert mass.names == alone.names and mass.positions["decoder"].equal(alone.positions["decoder"])
        for what in SUMS:
            torch.testing.assert_close(getattr(mass, what), getattr(alone, what))


def test_the_shipped_configurations_are_what_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    names = {path.stem for path in (ROOT / "recipes" / "accelerate").glob("*.yaml")}
    assert names == {"one_gpu", "several_gpus", "fsdp2", "several_machines"}
    read = {name: load_config_from_file(str(ROOT / "recipes" / "accelerate" / f"{name}.yaml")) for name in names}
    kinds = {"one_gpu": "NO", "several_gpus": "MULTI_GPU", "several_machines": "MULTI_GPU", "fsdp2": "FSDP"}
    assert {name: config.distributed_type for name, config in read.items()} == kinds
    assert read["one_gpu"].num_processes == 1 and read["several_gpus"].num_processes > 1
    assert read["several_machines"].num_machines > 1 and read["fsdp2"].fsdp_config["fsdp_version"] == 2
