"""What a training run depends on, recorded beside its checkpoints: only the same run is resumed."""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..neurons.adapter_file import MASK
from ..neurons.base_model import unwrap
from ..neurons.files import remove_written, replacing
from ..neurons.language_pairs import shorten
from .processes import this_process

RUN_FILE = "run.json"
COMPLETE_MARKER = "complete.json"
# Arguments that change where and how fast a run computes, and what it reports, but not what it learns. Two of them
# are compared as their product: gradient_accumulation_steps x processes is the number of batches per update.
FREE_ARGUMENTS = (
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "do_", "num_train_epochs",
    "logging_", "log_", "disable_tqdm", "report_to", "run_name", "project", "trackio_", "hub_", "push_to_hub",
    "include_", "skip_memory_metrics", "debug", "save_", "enable_jit_checkpoint", "eval_accumulation_steps",
    "use_cpu", "local_rank", "ddp_", "fsdp", "accelerator_config", "parallelism_config", "gradient_accumulation_steps",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "preprocessing_",
    "activation_checkpointing", "gradient_checkpointing", "torch_compile",
    "torch_empty_cache_steps",
    "generation_", "predict_with_generate", "sortish_sampler", "length_column_name", "prediction_loss_only",
)  # fmt: skip
_FREE_ADAPTER_SETTINGS = (
    "execution", "inference_mode", "revision", "base_model_name_or_path", "peft_version", "auto_mapping",
    "weights_digest",
)  # fmt: skip
_SHOWN = 60  # characters of a value in a message


class Run:
    """One training run's directory: what the run depends on, whether it finished, and what it measured.

    Args:
        output_dir: the run's directory.
        depends_on: name → value that JSON can hold, as `run_dependencies` returns.

    Raises:
        ValueError: if the directory holds a run that depends on something else, or checkpoints of no known run.
    """

    def __init__(self, output_dir: str | Path, depends_on: Mapping[str, Any]) -> None:
        self.directory = Path(output_dir)
        self.depends_on = json.loads(json.dumps(depends_on))
        self._check_is_ours()
        stored = _read_json(self.directory / RUN_FILE) or {}
        self.checkpoint = last_complete_checkpoint(str(self.directory))
        self.result: dict[str, Any] | None = stored.get("result")
        if self.result is not None:  # the directory may have been moved since
            self.result["saved"] = str(self.directory / Path(self.result["saved"]).name)
        if self.result is None and self.checkpoint is None:
            stored = {}  # nothing was trained yet, so nothing can be mixed up
        elif differences := _differences(stored["depends_on"], self.depends_on):
            raise ValueError(
                f"{self.directory} holds a run with other settings: {'; '.join(differences)}. Repeat the settings of "
                f"that run to resume it. {_WAY_OUT}"
            )
        self.initial_losses: dict[str, float] = stored.get("initial_losses", {})

    def _check_is_ours(self) -> None:
        """Raise ValueError if what stands here was made by something else: the Trainer removes old checkpoints."""
        stored, others = _read_json(self.directory / RUN_FILE), _checkpoints(self.directory)
        if isinstance(stored, dict) and "depends_on" in stored:
            return
        if others or (self.directory / RUN_FILE).exists():
            found = shorten([path.name for path in others]) or f"a {RUN_FILE} of something else"
            raise ValueError(f"{self.directory} holds {found}, and no {RUN_FILE} of a training run. {_WAY_OUT}")

    def write(self) -> None:
        """Write `run.json` atomically; only the main process does."""
        if this_process().is_main_process:
            run = {"depends_on": self.depends_on, "initial_losses": self.initial_losses, "result": self.result}
            _write_json(self.directory / RUN_FILE, run)


_WAY_OUT = "Choose another --output_dir, or discard what is there with --overwrite_output_dir."


def discard_run(output_dir: str | Path, model: nn.Module) -> None:
    """Remove what an earlier run left in a directory, and nothing else: checkpoints, and the results it recorded.

    Raises:
        ValueError: if `model`, which is to be trained, was loaded from there.
    """
    process = this_process()
    directory = Path(output_dir)
    origin = Path(getattr(unwrap(model), "name_or_path", ""))
    if origin.is_dir() and directory.resolve() in origin.resolve().parents:
        raise ValueError(
            f"--overwrite_output_dir would remove the model that is to be trained, {origin}. Choose an --output_dir "
            "that does not hold it."
        )
    if process.is_main_process:
        stored = _read_json(directory / RUN_FILE)
        result = stored.get("result") if isinstance(stored, dict) else None
        for checkpoint in _checkpoints(directory):
            shutil.rmtree(checkpoint)
        if result is not None:
            remove_written(directory / Path(result["saved"]).name)
            (directory / "results.json").unlink(missing_ok=True)
        (directory / RUN_FILE).unlink(missing_ok=True)
    process.wait_for_everyone()


def run_dependencies(
    model: nn.Module, args: TrainingArguments, data: Mapping[str, Dataset], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return everything that decides what a run learns: name → a value that JSON can hold.

    Args:
        model: the model to train, before its first update.
        args: training arguments; those in `FREE_ARGUMENTS` are left out.
        data: name → what `encode_parallel` returns, whose fingerprint is a digest of its content.
        settings: whatever else counts, such as the language pairs.
    """
    found = decisive_arguments(args)
    found["batches per update (gradient_accumulation_steps x processes)"] = (
        args.gradient_accumulation_steps * args.world_size
    )
    found |= settings
    found |= {f"model {name}": value for name, value in configuration(model).items()}
    for name, config in getattr(model, "peft_config", {}).items():
        options = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
        found |= {f"adapter {name}: {k}": v for k, v in options.items() if k not in _FREE_ADAPTER_SETTINGS}
    tensors = unwrap(model).state_dict()
    masks = {name: tensor for name, tensor in tensors.items() if MASK in name}
    found["masks"] = tensor_digest(masks.items())
    found["model weights"] = tensor_digest((name, tensor) for name, tensor in tensors.items() if name not in masks)
    for name, rows in data.items():
        found[name] = f"{len(rows)} sentence pairs, digest {rows._fingerprint}"
    return found


def decisive_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the training arguments that decide what a run learns, all but `FREE_ARGUMENTS`: name → value."""
    return {
        field.name: value
        for field in dataclasses.fields(args)
        if not field.name.startswith(FREE_ARGUMENTS)
        and isinstance(value := getattr(args, field.name), int | float | str | list | dict | None)
    }


def configuration(model: nn.Module) -> dict[str, Any]:
    """Return what a model's configuration says, such as its heads and dropout, which its weights do not tell.

    Left out are versions, and where the model was loaded from.
    """
    settings = unwrap(model).config.to_dict()
    return {name: value for name, value in settings.items() if "version" not in name and name != "_name_or_path"}


def tensor_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a digest of names, types, shapes and values, in 16 hexadecimal digits."""
    hashed = hashlib.sha256()
    for name, tensor in tensors:
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()[:16]


def training_of(checkpoint: str | Path) -> dict[str, int | None] | None:
    """Return the "updates" of the run that made a checkpoint, its "max_steps" and its "patience"; None if unknown.

    Args:
        checkpoint: directory of the model; `run.json`, or the recipe's `results.json`, stands beside it.
    """
    run = _read_json(Path(checkpoint).parent / RUN_FILE) or {}
    if run.get("result") is not None:
        settings, updates = run["depends_on"], run["result"]["updates"]
    else:
        results = _read_json(Path(checkpoint).parent / "results.json") or {}
        settings = {name: value for part in results.get("arguments", []) for name, value in part.items()}
        updates = results.get("updates")
    if updates is None or "max_steps" not in settings:
        return None
    return {"updates": updates, "max_steps": settings["max_steps"], "patience": settings.get("patience")}


def planned_updates(directory: str | Path) -> int | None:
    """Return the `max_steps` of the run that a directory holds, or None if it holds none."""
    return (_read_json(Path(directory) / RUN_FILE) or {}).get("depends_on", {}).get("max_steps")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} was {_shown(before.get(name))}, now {_shown(now.get(name))}" for name in names]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class MarkComplete(TrainerCallback):
    """Mark a checkpoint once every process has written its part; only marked ones are resumed from.

    The marker records the seconds spent on the run so far, so that those of a resumed run add up. What is measured
    before the first update is not counted: models with masks are measured twice then, others once.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before = seconds_until(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
        best = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and best.is_dir():
            state.best_model_checkpoint = str(best)  # the directory may have been moved since

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()  # a run has one epoch

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        this_process().wait_for_everyone()
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            seconds = self._before + time.perf_counter() - self._began
            marker = {"global_step": state.global_step, "seconds": seconds, "bytes": _file_sizes(checkpoint)}
            _write_json(checkpoint / COMPLETE_MARKER, marker)


def seconds_until(checkpoint: str | Path | None) -> float:
    """Return the seconds of training that a checkpoint took; 0 without one, or where it does not say."""
    marker = None if checkpoint is None else _read_json(Path(checkpoint) / COMPLETE_MARKER)
    return (marker or {}).get("seconds", 0.0)


def last_complete_checkpoint(output_dir: str) -> str | None:
    """Return the newest checkpoint in `output_dir` that is complete and unchanged since it was written, or None.

    The checkpoint with the highest number may be incomplete. One with a damaged file, or whose best checkpoint so far
    is damaged, is skipped with a message.
    """
    for checkpoint in reversed(_checkpoints(Path(output_dir))):
        fault = _fault(checkpoint)
        if fault is None and (best := _read_json(checkpoint / "trainer_state.json")["best_model_checkpoint"]):
            best_one = Path(output_dir) / Path(best).name
            fault = _fault(best_one) and f"the best checkpoint before it, {best_one.name}, {_fault(best_one)}"
        if fault is None:
            return str(checkpoint)
        if this_process().is_main_process:
            print(f"not resuming from {checkpoint}: {fault}", flush=True)
    return None


def _checkpoints(directory: Path) -> list[Path]:
    """Return the directories that the Trainer takes for checkpoints, by their number."""
    found = [path for path in directory.glob("checkpoint-*/") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _fault(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint, or return None."""
    marker = _read_json(checkpoint / COMPLETE_MARKER)
    if not isinstance(marker, dict) or not isinstance(marker.get("bytes"), dict):
        return f"it has no readable {COMPLETE_MARKER}, so writing it was interrupted"
    found = _file_sizes(checkpoint)
    damaged = [name for name, size in marker["bytes"].items() if found.get(name) != size]
    if damaged:
        return f"{damaged[0]} has changed since it was written"
    state = _read_json(checkpoint / "trainer_state.json")
    readable = isinstance(state, dict) and "best_model_checkpoint" in state
    return None if readable else "its trainer_state.json cannot be read"


def _file_sizes(directory: Path) -> dict[str, int]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != COMPLETE_MARKER)
    return {str(path.relative_to(directory)): path.stat().st_size for path in files}


def load_trained(model: Any, directory: str | Path) -> None:
    """Load into `model` what a finished run saved in `directory`: an adapter, or a whole model."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_peft_weights(str(directory), device="cpu"), model.active_adapter)
    else:
        model.load_state_dict(type(model).from_pretrained(directory).state_dict())


def _read_json(path: Path) -> Any:
    """Return what a JSON file holds, or None if it is missing or truncated."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_json(path: Path, value: Any) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
