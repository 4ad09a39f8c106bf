"""Training: transformers' Seq2SeqTrainer, and what multilingual specialization needs in addition."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn import functional as F
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
from ..neurons.files import replace_directory
from .arrow import numpy_column
from .batching import DirectionBatchSampler, TranslationCollator
from .encoding import encode_parallel
from .processes import this_process
from .sharding import shard
from .tokenization import resolve_tokens

COMPLETE_MARKER = "complete.json"


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
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep, the best among them."})


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
        callbacks: list[TrainerCallback] = [_MarkComplete()]
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

    def _token_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Sum the cross-entropy over target tokens and divide by those of the whole accumulated, gathered batch.

        Labels are smoothed while training; the validation loss is not, so that it compares across settings.
        """
        training = self.model is not None and self.model.training
        smoothing = self.args.label_smoothing_factor if training else 0.0
        loss = F.cross_entropy(
            outputs["logits"].flatten(0, 1).float(), labels.flatten(), reduction="sum", label_smoothing=smoothing
        )
        tokens = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        return loss / tokens


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
    preprocessing_num_workers: int = 1,
) -> dict[str, Any]:
    """Train `model` on every direction of `train`, resuming from the newest complete checkpoint if there is one.

    The result is saved with its tokenizer as `adapter` (for a model with adapters) or `model` in the output directory.

    With validation data, the model is evaluated every `eval_steps` and left at its best validation loss.

    Args:
        model: a seq2seq model, with adapters or without.
        tokenizer: its tokenizer.
        train: pair → Dataset with columns "source" and "target".
        validation: likewise, of the same directions; None to train without.
        args: how to train.
        language_tokens: language code → language token, where codes are not tokens themselves.
        source_tag: what the tag on the source side names.
        max_length: truncate training text to this many tokens.
        preprocessing_num_workers: processes that tokenize.

    Returns:
        The Trainer's metrics, with "updates", "best_validation_loss", the log of losses, and where it was "saved".
    """
    pairs = list(train)
    tokens = resolve_tokens(tokenizer, pairs, language_tokens)
    if validation is not None and list(validation) != pairs:
        raise ValueError(
            f"Training data has the pairs {pairs}, validation data {list(validation)}; expected the same."
        )
    with args.main_process_first(desc="tokenizing"):
        encoded = [
            None
            if data is None
            else encode_parallel(
                data,
                tokenizer,
                tokens,
                source_tag=source_tag,
                max_length=max_length,
                num_workers=preprocessing_num_workers,
            )
            for data in (train, validation)
        ]
    if validation is not None:
        args.eval_strategy = args.save_strategy = IntervalStrategy.STEPS
        args.eval_steps = args.save_steps = int(args.eval_steps or args.save_steps)
        args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better = True, "eval_loss", False
    trainer = SpecializationTrainer(model, args, tokenizer, encoded[0], encoded[1], pairs)
    result = trainer.train(resume_from_checkpoint=last_complete_checkpoint(str(args.output_dir)))
    directory = Path(str(args.output_dir)) / ("adapter" if is_routed(model) else "model")
    save_whole(trainer, directory)
    return {
        "saved": str(directory),
        **result.metrics,
        "updates": trainer.state.global_step,
        "best_validation_loss": trainer.state.best_metric,
        "log": trainer.state.log_history,
    }


def save_whole(trainer: Seq2SeqTrainer, directory: Path) -> None:
    """Save a trainer's model and tokenizer, gathering shards, and replace the whole directory at the end."""
    process = this_process()
    partial = directory.with_name(f".{directory.name}-partial")
    if process.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)  # left there by an interrupted run
    process.wait_for_everyone()
    trainer.save_model(str(partial))
    process.wait_for_everyone()
    if process.is_main_process:
        replace_directory(partial, directory)
    process.wait_for_everyone()


class _MarkComplete(TrainerCallback):
    """Mark a checkpoint once every process has written its part; resuming trusts only marked ones."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and checkpoint.is_dir():
            (checkpoint / COMPLETE_MARKER).write_text(json.dumps({"global_step": state.global_step}) + "\n")


def last_complete_checkpoint(output_dir: str) -> str | None:
    """Return the newest complete checkpoint in `output_dir`, or None.

    The checkpoint with the highest number may be incomplete.
    """
    marked = Path(output_dir).glob(f"checkpoint-*/{COMPLETE_MARKER}")
    steps = {json.loads(marker.read_text())["global_step"]: marker.parent for marker in marked}
    return str(steps[max(steps)]) if steps else None


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
