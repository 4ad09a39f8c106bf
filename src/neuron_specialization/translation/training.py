"""Training: transformers' Seq2SeqTrainer, and what multilingual specialization needs in addition."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    IntervalStrategy,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..adapter.active import active_config
from ..adapter.routing import is_routed, router_of
from ..neurons.base_model import unwrap
from ..neurons.files import begin_writing, check_replaceable, finish_writing, partial_folder
from .arrow import numpy_column
from .batching import DirectionBatchSampler, TranslationCollator
from .encoding import encode_parallel
from .loss import IGNORED, LinearHead, find_linear_head, logits_cross_entropy
from .processes import this_process
from .runs import MarkComplete, Run, discard_run, load_trained, run_dependencies
from .sharding import shard
from .tokenization import resolve_tokens


@dataclass
class SpecializationTrainingArguments(Seq2SeqTrainingArguments):
    """Seq2SeqTrainingArguments with the paper's settings (section 4.2) as defaults."""

    temperature: float = field(default=5.0, metadata={"help": "Sampling temperature T over directions."})
    patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a better validation loss."}
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="inverse_sqrt", metadata={"help": "Learning rate schedule."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Second momentum of Adam."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "Epsilon of Adam."})
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Label smoothing while training."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: batches carry their pairs."})
    ddp_broadcast_buffers: bool = field(default=False, metadata={"help": "Off: masks never change."})
    ddp_find_unused_parameters: bool = field(default=False, metadata={"help": "Off: every layer trains every step."})
    preprocessing_num_workers: int = field(default=1, metadata={"help": "Processes that tokenize."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep, the best among them."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Discard the run that output_dir holds, and start anew."}
    )


class SpecializationTrainer(Seq2SeqTrainer):
    """Seq2SeqTrainer with direction-homogeneous batches and a loss that accumulation and processes do not change.

    Args:
        model: the model to train, with adapters (then each sample runs under its pair's masks) or without.
        args: training arguments; `max_steps` must be set, because temperature sampling has no epochs.
        tokenizer: the model's tokenizer, saved with every checkpoint.
        train_dataset: what `encode_parallel` returns.
        eval_dataset: likewise; both list the directions in the order of `language_pairs`.
        language_pairs: names of the directions that the data's "language_pair" column counts.
    """

    def __init__(
        self,
        model: Any,
        args: SpecializationTrainingArguments,
        tokenizer: Any,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        language_pairs: list[str],
    ) -> None:
        if args.max_steps <= 0:
            raise ValueError("Set max_steps: with temperature sampling there are no epochs.")
        if not len(train_dataset):
            raise ValueError("The training data is empty.")
        switch_off_layerdrop(model)
        self._head: LinearHead | None = None  # the one that computes the loss of the current call
        self._plain_head: LinearHead | None = None
        self._looked_for_head = self._loss_only = False
        callbacks: list[TrainerCallback] = [MarkComplete()]
        if args.patience is not None:
            callbacks.append(EarlyStoppingCallback(args.patience))
        super().__init__(
            model=model,
            args=args,
            data_collator=TranslationCollator(tokenizer, model, pair_ids(model, language_pairs)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            compute_loss_func=self._token_loss,
        )
        if self.accelerator.is_fsdp2:
            shard(model, self.accelerator.state.fsdp_plugin)

    def get_train_dataloader(self) -> DataLoader:
        """Return batches of one direction each; the sampler spans the whole run of all processes."""
        args: Any = self.args
        data: Any = self.train_dataset
        sampler = DirectionBatchSampler(
            numpy_column(data, "language_pair"),
            numpy_column(data, "length"),
            args.per_device_train_batch_size,
            args.max_steps * args.gradient_accumulation_steps * args.world_size,
            args.temperature,
            args.data_seed if args.data_seed is not None else args.seed,
        )
        loader = DataLoader(
            data,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # gathered from shards, tied weights come as tensors of their own, and would be written once per name
        tied = getattr(self.model, "all_tied_weights_keys", {})
        if state_dict is not None:
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    def validation_loss(self) -> float:
        """Return the validation loss of the model as it stands, without a trace in the log or the random state."""
        with torch.random.fork_rng(devices=[]):  # a data loader draws a seed
            loop = self.evaluation_loop(self.get_eval_dataloader(), "Validation", prediction_loss_only=True)
        found = loop.metrics or {}
        self.callback_handler.on_predict(self.args, self.state, self.control, found)  # closes the progress bar
        return found["eval_loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        state: Any = self.state
        epoch, state.epoch = state.epoch, None  # the sampler spans the run, so it would end at 1
        super().log(logs, start_time)
        state.epoch = epoch

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = getattr(self.model, "all_tied_weights_keys", {})  # saved once, under another name
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """As the Trainer's, but without logits where the head is a plain linear layer and nobody asks for them."""
        self._head = None
        if self._loss_only or not return_outputs:
            if not self._looked_for_head:
                self._plain_head, self._looked_for_head = find_linear_head(model, inputs), True
            self._head = self._plain_head
        with self._head.computes_loss(inputs["labels"], self._smoothing) if self._head else nullcontext():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> Any:
        self._loss_only = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        finally:
            self._loss_only = False

    @property
    def _smoothing(self) -> float:
        """Labels are smoothed while training; the validation loss is not, so that it compares across settings."""
        return self.args.label_smoothing_factor if self.model is not None and self.model.training else 0.0

    def _token_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Sum the cross-entropy over target tokens and divide by those of the whole accumulated, gathered batch."""
        if self._head is not None:
            loss = outputs["logits"].sum()
        else:
            logits = outputs["logits"].flatten(0, 1)
            loss = logits_cross_entropy(logits, labels.flatten(), self._smoothing)
        return loss / (labels.ne(IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


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
) -> dict[str, Any]:
    """Train `model` on every direction of `train`, resuming from the newest complete checkpoint if there is one.

    The result is saved with its tokenizer as `adapter` (for a model with adapters) or `model` in the output directory.

    With validation data, the model is evaluated before the first update (a model with adapters also without them) and
    every `eval_steps`, and left at its best validation loss.

    What the run depends on stands in `run.json` beside the checkpoints: the arguments, except for those of
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
        max_length: truncate training text to this many tokens.

    Returns:
        The Trainer's metrics, with "updates", "base_validation_loss" and (under masks) "masked_validation_loss" before
        the first update, "best_validation_loss", the log of losses, where it was "saved", and whether the run had
        "finished_before".

    Raises:
        ValueError: if the data, the masks or the settings do not fit together, or the output directory holds a run
            that depends on something else and `overwrite_output_dir` is off.
    """
    directory = Path(str(args.output_dir)) / ("adapter" if is_routed(model) else "model")
    files = ["adapter_config.json", "config.json", "model.safetensors"]
    check_replaceable(directory, files, bool(args.overwrite_output_dir))
    pairs = list(train)
    tokens = resolve_tokens(tokenizer, pairs, language_tokens)
    if validation is not None and list(validation) != pairs:
        raise ValueError(
            f"Training data has the pairs {pairs}, validation data {list(validation)}; expected the same."
        )
    if args.overwrite_output_dir:
        discard_run(str(args.output_dir), model)
    if validation is not None:
        args.eval_strategy = args.save_strategy = IntervalStrategy.STEPS
        args.eval_steps = args.save_steps = int(args.eval_steps or args.save_steps)
        args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better = True, "eval_loss", False
    text = {"training data": train} if validation is None else {"training data": train, "validation data": validation}
    options: dict[str, Any] = {"source_tag": source_tag, "max_length": max_length}
    with args.main_process_first(desc="tokenizing"):
        data = {
            name: encode_parallel(part, tokenizer, tokens, **options, num_workers=args.preprocessing_num_workers)
            for name, part in text.items()
        }
    settings = {"language_pairs": pairs, "language_tokens": tokens, **options}
    run = Run(str(args.output_dir), run_dependencies(model, args, data, settings))
    if run.result is not None:
        this_process().print(f"{run.directory} holds this run, finished after {run.result['updates']} updates.")
        load_trained(model, run.result["saved"])
        return {**run.result, "finished_before": True}
    trainer = SpecializationTrainer(model, args, tokenizer, data["training data"], data.get("validation data"), pairs)
    if validation is not None:
        trainer.add_callback(_MeasureAtStart(trainer, run))
    run.write()
    if run.checkpoint is not None:
        this_process().print(f"resuming from step {run.checkpoint.rpartition('-')[2]}", flush=True)
    trained = trainer.train(resume_from_checkpoint=run.checkpoint)
    save_whole(trainer, directory, bool(args.overwrite_output_dir))
    run.result = {
        "saved": str(directory),
        **trained.metrics,
        "updates": trainer.state.global_step,
        **run.initial_losses,
        "best_validation_loss": trainer.state.best_metric,
        "log": trainer.state.log_history,
    }
    run.write()
    return {**run.result, "finished_before": False}


class _MeasureAtStart(TrainerCallback):
    """Measure the validation loss before the first update: of the base, and of the base under the masks."""

    def __init__(self, trainer: SpecializationTrainer, run: Run) -> None:
        self.trainer, self.run = trainer, run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0 and not self.run.initial_losses:
            model: Any = self.trainer.model
            losses = self.run.initial_losses
            with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
                losses["base_validation_loss"] = self.trainer.validation_loss()
            if is_routed(model):
                losses["masked_validation_loss"] = self.trainer.validation_loss()
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


def pair_ids(model: Any, language_pairs: list[str]) -> torch.Tensor | None:
    """Return the adapter's id of each direction, int64 [directions], or None for a model without routing.

    Raises:
        ValueError: if the adapter has no route for a direction.
    """
    config = active_config(model)
    if config is None:
        return None
    resolvers = router_of(model).resolvers
    resolver = next(resolver for name, resolver in resolvers.items() if model.peft_config[name] is config)
    return torch.tensor([resolver.pair_id(pair) for pair in language_pairs])


def switch_off_layerdrop(model: Any) -> None:
    """Train every layer in every step: dropped layers leave parameters without gradient, which DDP refuses."""
    base = unwrap(model)
    for stack in ("encoder", "decoder"):
        if getattr(base.config, f"{stack}_layerdrop", 0):
            setattr(base.config, f"{stack}_layerdrop", 0.0)
            getattr(base, f"get_{stack}")().layerdrop = 0.0
