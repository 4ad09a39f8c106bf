"""transformers' Seq2SeqTrainer for multilingual specialization: its arguments, batches and loss."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import EvalLoopOutput

from ..adapter.active import active_config
from ..adapter.routing import router_of
from ..neurons.base_model import unwrap
from ..neurons.positions import IGNORED
from .alignment import alignment_loss
from .arrow import list_lengths, numpy_column
from .batching import DirectionBatchSampler, TranslationCollator, evaluation_batches
from .denoising import Noise, NoisyExamples, NumberedBatches
from .loss import LinearHead, find_linear_head, logits_cross_entropy
from .runs import MarkComplete
from .sharding import shard


@dataclass
class SpecializationTrainingArguments(Seq2SeqTrainingArguments):
    """Seq2SeqTrainingArguments with settings of the paper (section 4.2) as defaults.

    The paper also warms up over 4,000 updates, and stops after 20 evaluations without a better loss.
    """

    # fields of transformers' that mean nothing where directions are sampled, and scored apart from training, where
    # output_dir says what is resumed, and where every evaluation is saved and the best one kept
    NO_EFFECT: ClassVar[tuple[str, ...]] = (
        *("num_train_epochs", "train_sampling_strategy", "length_column_name", "sortish_sampler"),
        *("dataloader_multiprocessing_context", "dataloader_in_order", "dataloader_drop_last"),
        *("predict_with_generate", "generation_max_length", "generation_num_beams", "generation_config"),
        *("do_train", "do_eval", "do_predict", "resume_from_checkpoint", "auto_find_batch_size"),
        *("eval_strategy", "save_strategy", "save_steps", "load_best_model_at_end"),
        *("metric_for_best_model", "greater_is_better"),
    )

    temperature: float = field(default=5.0, metadata={"help": "Sampling temperature T over directions."})
    patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a better validation loss."}
    )
    max_steps: int = field(default=-1, metadata={"help": "Updates to make."})
    eval_steps: int = field(
        default=500, metadata={"help": "Validate and save after every so many updates; the best one is kept."}
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="inverse_sqrt", metadata={"help": "Learning rate schedule."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Second momentum of Adam."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "Epsilon of Adam."})
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Label smoothing while training."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must be off: batches hold their pairs."})
    ddp_broadcast_buffers: bool = field(default=False, metadata={"help": "Off: masks never change."})
    ddp_find_unused_parameters: bool = field(default=False, metadata={"help": "Off: every layer trains every step."})
    preprocessing_num_workers: int = field(default=1, metadata={"help": "Processes that tokenize."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep, the best among them."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Discard the run that output_dir holds, and start again."}
    )


def check_max_steps(args: SpecializationTrainingArguments) -> None:
    """Raise a ValueError unless `max_steps` is set, and `eval_steps` a number of updates."""
    if args.max_steps <= 0:
        raise ValueError("Set max_steps: with temperature sampling there are no epochs.")
    if args.eval_steps < 1:
        raise ValueError(f"eval_steps is a number of updates, at least 1; got {args.eval_steps}.")


def check_one_gpu(args: TrainingArguments) -> None:
    """Raise a ValueError if this process sees several GPUs: transformers would copy the model to each, and masks with
    their routes stay with the original; and each GPU would get a batch of its own."""
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs: start one for each with `accelerate launch`, or show it one with "
            "CUDA_VISIBLE_DEVICES=0."
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
        noise: train to restore each target from a noised copy of it; by default to translate.
        alignment: weight of `alignment_loss` beside the cross-entropy per token, while training; its negatives are the
            sentences of the batch on one device.
        target_tags: token ids of the target languages' tags, which the validation loss leaves out as `token_losses`
            does: under masks, or trained on one direction, a model knows the tag, and others can only guess it.

    Raises:
        ValueError: if there is nothing to train on, or the settings do not fit together.
    """

    def __init__(
        self,
        model: Any,
        args: SpecializationTrainingArguments,
        tokenizer: Any,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        language_pairs: list[str],
        noise: Noise | None = None,
        alignment: float = 0.0,
        target_tags: Sequence[int] = (),
    ) -> None:
        check_max_steps(args)
        check_one_gpu(args)
        if not len(train_dataset):
            raise ValueError("The training data is empty.")
        args.dataloader_pin_memory &= torch.accelerator.is_available()  # or torch warns at each evaluation
        switch_off_layerdrop(model)
        self._head: LinearHead | None = None  # the one that computes the loss of the current call
        self._plain_head: LinearHead | None = None
        self._looked_for_head = self._loss_only = False
        self._evaluated: list[torch.Tensor] = []  # nats and tokens of each batch of an evaluation
        if alignment < 0 or (alignment and (noise is not None or active_config(model) is not None)):
            raise ValueError(
                "The weight of the token-alignment loss is 0 (off) or above, and it is computed of translations, in "
                "a model without adapters."
            )
        self.noise, self.alignment = noise, alignment
        self._tags = torch.tensor(list(target_tags), dtype=torch.long)
        self._source_mask: torch.Tensor | None = None  # of the current call, where states are aligned
        self._drawn_from = args.data_seed if args.data_seed is not None else args.seed
        callbacks: list[TrainerCallback] = [MarkComplete()]
        if args.patience is not None:
            callbacks.append(_Patience(args.patience))
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
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2 and active_config(model) is not None:
            raise ValueError(
                "FSDP version 1 flattens weights, so that masks would meet the wrong rows: set fsdp_version to 2."
            )
        if self.accelerator.is_fsdp2:
            if alignment:
                raise ValueError("The token-alignment loss runs the encoder alone, which FSDP2 does not allow.")
            shard(model, self.accelerator.state.fsdp_plugin)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # before its first update, where a resumed run has come to its end
            super()._run_epoch(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Return batches of one direction each; the sampler spans the whole run of all processes."""
        batches = self._batches(self.args.max_steps)
        return self._loader(self.train_dataset, batches if self.noise is None else NumberedBatches(batches))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return batches of one direction each here too: some models take no others, and masks run compactly."""
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        batches = evaluation_batches(
            numpy_column(data, "language_pair"),
            numpy_column(data, "length"),
            self.args.eval_batch_size,
            self.args.world_size,
        )
        return self._loader(data, batches)

    def _loader(self, data: Any, batches: Any) -> DataLoader:
        args: Any = self.args
        loader = DataLoader(
            data if self.noise is None else NoisyExamples(data, self.noise, self._drawn_from),
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            # an evaluation is over soon, and the next one has a loader of its own
            persistent_workers=args.dataloader_persistent_workers and data is self.train_dataset,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def _batches(self, updates: int) -> DirectionBatchSampler:
        """Return the batches of the first updates of the run, of all processes."""
        args: Any = self.args
        data: Any = self.train_dataset
        return DirectionBatchSampler(
            numpy_column(data, "language_pair"),
            numpy_column(data, "length"),
            args.per_device_train_batch_size,
            updates * args.gradient_accumulation_steps * args.world_size,
            args.temperature,
            self._drawn_from,
        )

    def target_tokens(self, updates: int) -> int:
        """Return how many target tokens the first updates of the run train on, tags and ends of sentences included."""
        lengths = list_lengths(cast(Dataset, self.train_dataset), "labels")
        return sum(int(lengths[batch].sum()) for batch in self._batches(updates))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # gathered from shards, tied weights come as tensors of their own, and would be written once per name
        tied = getattr(self.model, "all_tied_weights_keys", {})
        if state_dict is not None:
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    def validation_loss(self) -> float:
        """Return the model's present validation loss, without changing the log or the random state."""
        with torch.random.fork_rng(devices=[]):  # a data loader draws a seed
            loop = self.evaluation_loop(self.get_eval_dataloader(), "Validation", prediction_loss_only=True)
        found = loop.metrics or {}
        self.callback_handler.on_predict(self.args, self.state, self.control, found)  # closes the progress bar
        return found["eval_loss"]

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the Trainer's, whose loss is a mean over batches; this one is in nats per token, whatever the batches.

        Where there are fewer sentences than processes, some repeat a sentence, and it counts again.
        """
        self._evaluated = []
        about = (description, prediction_loss_only, ignore_keys, metric_key_prefix)
        output = super().evaluation_loop(dataloader, *about)
        nats, tokens = cast(Any, self.accelerator.reduce(torch.stack(self._evaluated).sum(0)))
        metrics = {**(output.metrics or {}), f"{metric_key_prefix}_loss": (nats / tokens).item()}
        return output._replace(metrics=metrics)

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
        """As the Trainer's, but without logits where the head is a plain linear layer and no outputs are returned."""
        self._head = None
        self._source_mask = inputs["attention_mask"] if self.alignment and self._is_training else None
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
        labels = inputs["labels"]
        known = torch.isin(labels, self._tags.to(labels.device))
        inputs = {**inputs, "labels": labels.masked_fill(known, IGNORED)}
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        finally:
            self._loss_only = False

    @property
    def _smoothing(self) -> float:
        """Labels are smoothed while training; the validation loss is not, so that it compares across settings."""
        return self.args.label_smoothing_factor if self._is_training else 0.0

    @property
    def _is_training(self) -> bool:
        return self.model is not None and self.model.training

    def _token_loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Sum the cross-entropy over target tokens and divide by those of the whole accumulated, gathered batch."""
        if self._head is not None:
            loss = outputs["logits"].sum()
        else:
            logits = outputs["logits"].flatten(0, 1)
            loss = logits_cross_entropy(logits, labels.flatten(), self._smoothing)
        counted = labels.ne(IGNORED)
        if not self._is_training:
            self._evaluated.append(torch.stack([loss.detach().float(), counted.sum().float()]))
        if self._source_mask is not None:
            # weighted by tokens, as the cross-entropy is, so that accumulated batches count by their size
            model, tokenizer = cast(Any, self.model), cast(Any, self.processing_class)
            translations = labels.masked_fill(~counted, tokenizer.pad_token_id)
            states = unwrap(model).get_encoder()(input_ids=translations, attention_mask=counted.long())[0]
            aligned = alignment_loss(outputs["encoder_last_hidden_state"], self._source_mask, states, counted)
            loss = loss + self.alignment * counted.sum() * aligned
        return loss / (counted.sum() if num_items_in_batch is None else num_items_in_batch)


class _Patience(EarlyStoppingCallback):
    """Early stopping that goes on counting where an interrupted run had stopped."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        validated = [entry["step"] for entry in state.log_history if "eval_loss" in entry]
        self.early_stopping_patience_counter = sum(step > (state.best_global_step or 0) for step in validated)
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience


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
