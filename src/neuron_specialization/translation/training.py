"""Training runs: `fit` tokenizes, trains, resumes and saves."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import (
    IntervalStrategy,
    Seq2SeqTrainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..adapter.routing import is_routed
from ..neurons.base_model import number_of_positions, unwrap
from ..neurons.card import describe_adapter
from ..neurons.card_sections import CardFacts
from ..neurons.files import begin_writing, check_not_input, check_replaceable, finish_writing, partial_folder
from ..neurons.language_pairs import split_pair
from ..neurons.training_facts import training_facts
from .denoising import Noise
from .encoding import encode_parallel
from .processes import this_process
from .results import environment
from .runs import RUN_FILE, Run, discard_run, load_trained, run_dependencies, seconds_until
from .tokenization import resolve_tokens
from .trainer import SpecializationTrainer, SpecializationTrainingArguments, check_max_steps


def fit(
    model: Any,
    tokenizer: Any,
    train: Mapping[str, Dataset],
    validation: Mapping[str, Dataset] | None,
    args: SpecializationTrainingArguments,
    *,
    language_tokens: Mapping[str, str] | None = None,
    source_tag: str = "source",
    max_length: int = 128,
    callbacks: Sequence[TrainerCallback] = (),
    noise: Noise | None = None,
    alignment: float = 0.0,
    card: CardFacts | None = None,
) -> dict[str, Any]:
    """Train `model` on every direction of `train`, resuming from the newest complete checkpoint if there is one.

    The result is saved with its tokenizer as `adapter` (for a model with adapters; its card tells of the training) or
    `model` in the output directory.

    With validation data, the model is evaluated before the first update (a model with adapters also without them) and
    every `eval_steps`, and left at its best validation loss, in nats per target token without the language tag.

    `run.json`, beside the checkpoints, records what the run depends on: the arguments, except those in
    `runs.FREE_ARGUMENTS`, the data, the masks and the weights that training starts from (so seed what is drawn at
    random). A run that differs in one of them is not resumed. A finished run is not trained again: what it saved is
    loaded into `model`, and no file changes.

    Args:
        model: a seq2seq model, with adapters or without.
        tokenizer: its tokenizer.
        train: pair → Dataset with columns "source" and "target".
        validation: likewise, of the same directions; None to train without.
        args: how to train.
        language_tokens: language code → language token, where codes are not tokens themselves.
        source_tag: what the tag on the source side names.
        max_length: truncate training text to this many tokens, or to the model's positions if there are fewer.
        callbacks: further ones for the Trainer. What they change must follow from what the run depends on.
        noise: train to restore each target from a noised copy of it, its source not used; by default to translate.
        alignment: weight of the token-alignment loss on encoder states (see `alignment_loss`); 0 is without.
        card: what else the adapter's card tells, such as what its neurons were identified on.

    Returns:
        The Trainer's metrics ("train_runtime" summed over the pieces of a resumed run, without the validation before
        the first update), with "updates" and the "target_tokens" of these, "base_validation_loss" and (under masks)
        "masked_validation_loss" before the first update, "best_validation_loss", the log of losses, where it was
        "saved", and whether the run had "finished_before".

    Raises:
        ValueError: if the data, the masks or the settings do not fit together, or the output directory holds a run
            that depends on something else and `overwrite_output_dir` is off.
    """
    directory = Path(str(args.output_dir)) / ("adapter" if is_routed(model) else "model")
    overwrite = bool(args.overwrite_output_dir)
    check_replaceable(directory, ["adapter_config.json", "config.json", "model.safetensors"], overwrite)
    pairs = list(train)
    tokens = resolve_tokens(tokenizer, pairs, language_tokens, source_tag)
    if validation is not None and list(validation) != pairs:
        raise ValueError(
            f"Training data has the pairs {pairs}, validation data {list(validation)}; expected the same."
        )
    if overwrite:
        discard_run(str(args.output_dir), model)
    check_not_input(directory, getattr(unwrap(model), "name_or_path", None) or None)
    check_max_steps(args)  # before text is tokenized
    if validation is not None:
        _keep_the_best(args)
    max_length = min(max_length, number_of_positions(model) or max_length)
    options: dict[str, Any] = {"source_tag": source_tag, "max_length": max_length}
    with args.main_process_first(desc="tokenizing"):
        data = {
            name: encode_parallel(part, tokenizer, tokens, **options, num_workers=args.preprocessing_num_workers)
            for name, part in (("training data", train), ("validation data", validation))
            if part is not None
        }
    settings = {"language_pairs": pairs, "language_tokens": tokens, **options}
    if noise is not None:
        settings["noise"] = noise.settings
    if alignment:
        settings["alignment"] = alignment
    run = Run(str(args.output_dir), run_dependencies(model, args, data, settings))
    if run.result is not None:
        this_process().print(f"{run.directory} holds this run, finished after {run.result['updates']} updates.")
        load_trained(model, run.result["saved"])
        return {**run.result, "finished_before": True}
    target_tags = tokenizer.convert_tokens_to_ids(sorted({tokens[split_pair(pair)[1]] for pair in pairs}))
    parts = data["training data"], data.get("validation data")
    trainer = SpecializationTrainer(model, args, tokenizer, *parts, pairs, noise, alignment, target_tags)
    for callback in callbacks:
        trainer.add_callback(callback)
    return {**_train(trainer, run, directory, overwrite, card or CardFacts()), "finished_before": False}


def _keep_the_best(args: SpecializationTrainingArguments) -> None:
    """Evaluate and save every `eval_steps`, and end with the weights of the lowest validation loss."""
    args.eval_strategy = args.save_strategy = IntervalStrategy.STEPS
    args.save_steps = args.eval_steps
    args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better = True, "eval_loss", False


def _train(
    trainer: SpecializationTrainer, run: Run, directory: Path, overwrite: bool, card: CardFacts
) -> dict[str, Any]:
    """Train, from the run's newest checkpoint if it has one, save the model and return the result of the run."""
    measured = _MeasureAtStart(trainer, run)
    if trainer.eval_dataset is not None:
        trainer.add_callback(measured)
    run.write()
    if run.checkpoint is not None:
        this_process().print(f"resuming from step {run.checkpoint.rpartition('-')[2]}", flush=True)
    seconds_before = seconds_until(run.checkpoint)
    trained = trainer.train(resume_from_checkpoint=run.checkpoint)
    save_whole(trainer, directory, overwrite)
    run.result = {
        "saved": str(directory),
        **trained.metrics,
        "train_runtime": seconds_before + trained.metrics["train_runtime"] - measured.seconds,
        "updates": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "target_tokens": trainer.target_tokens(trainer.state.global_step),
        **run.initial_losses,
        "best_validation_loss": trainer.state.best_metric,
        "log": trainer.state.log_history,
        "environment": environment(),
    }
    run.write()
    model: Any = trainer.model
    if is_routed(model) and trainer.is_world_process_zero():
        describe_adapter(directory, replace(card, training=training_facts(run.directory / RUN_FILE)))
    return run.result


class _MeasureAtStart(TrainerCallback):
    """Measure the validation loss before the first update: of the base, and of the base under the masks."""

    def __init__(self, trainer: SpecializationTrainer, run: Run) -> None:
        self.trainer, self.run = trainer, run
        self.seconds = 0.0  # that it took

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0 and not self.run.initial_losses:
            started = time.perf_counter()
            model: Any = self.trainer.model
            losses = self.run.initial_losses
            with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
                losses["base_validation_loss"] = self.trainer.validation_loss()
            if is_routed(model):
                losses["masked_validation_loss"] = self.trainer.validation_loss()
            self.seconds = time.perf_counter() - started
            self.run.write()
            if state.is_world_process_zero:
                print(", ".join(f"{name.replace('_', ' ')} {loss:.4f}" for name, loss in losses.items()), flush=True)


def save_whole(trainer: Seq2SeqTrainer, directory: Path, overwrite: bool = False) -> None:
    """Save a trainer's model and tokenizer, gathering shards; all files are moved into place together at the end."""
    process = this_process()
    if process.is_main_process:
        begin_writing(directory)
    process.wait_for_everyone()
    trainer.save_model(str(partial_folder(directory)))
    process.wait_for_everyone()
    if process.is_main_process:
        finish_writing(directory, overwrite)
    process.wait_for_everyone()
