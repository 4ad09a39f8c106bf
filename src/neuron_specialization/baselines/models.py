"""The models of a comparison: made from one baseline, and trained on the same data under the same budget."""

import copy
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback, set_seed

from ..neurons.activations import ACTIVITY, ActivationCounts
from ..neurons.controls import check_exchanged_pairs, exchanged
from ..neurons.language_pairs import check_pivot
from ..translation.arguments import as_mapping
from ..translation.identification import record_corpus
from ..translation.messages import check_positive
from ..translation.processes import this_process
from ..translation.results import write_results
from ..translation.token_loss import token_losses
from ..translation.trainer import SpecializationTrainingArguments, check_max_steps, check_one_gpu
from ..translation.training import fit
from . import lass
from .folders import alone, identification_folder, remove_checkpoints
from .gradual import GradualMasks
from .methods import (
    IDENTIFIED_BY,
    LASS,
    PER_DIRECTION,
    WEIGHTS,
    WRONG_PAIR,
    MethodArguments,
    build_model,
    check_methods,
    knob_grids,
    parse_method,
    seeds_of,
)
from .settings import StageArguments
from .trials import Setting, Trials


@dataclass
class Models:
    """Makes and trains the model of every stage, as its trials choose.

    Attributes:
        baseline: the multilingual model that all start from.
        tokenizer: its tokenizer.
        data: "train", "validation", "test" → pair → Dataset with columns "source" and "target".
        stage: the budget.
        method: settings of the methods.
        training: arguments of the Trainer; each run sets the output directory, seed, updates and learning rate itself.
        language_tokens: language code → language token.
        source_tag: what the tag on the source side names.
        pivot: language of the one-to-many and many-to-one groups.
        max_length: truncate training text to this many tokens.

    Raises:
        ValueError: if a grid of knobs is malformed, a part of the budget is out of range, no direction has the pivot,
            or a listed method is unknown or lacks a setting (see `check`).
    """

    baseline: Any
    tokenizer: Any
    data: Mapping[str, Mapping[str, Dataset]]
    stage: StageArguments
    method: MethodArguments
    training: SpecializationTrainingArguments
    language_tokens: Mapping[str, str] | None = None
    source_tag: str = "source"
    pivot: str | None = None
    max_length: int = 128

    def __post_init__(self) -> None:
        check_one_gpu(self.training)
        check_max_steps(self.training)
        self.baseline.to(this_process().device)
        self.directory = Path(str(self.training.output_dir))
        self.language_pairs = list(self.data["train"])
        if not 0 < self.stage.trial_share <= 1:
            raise ValueError(f"trial_share must be above 0 and at most 1, got {self.stage.trial_share}.")
        check_positive(evaluations=self.stage.evaluations, tuning_directions=self.stage.tuning_directions)
        check_pivot(self.pivot, self.language_pairs)
        knob_grids(self.stage.knobs)  # which checks them
        self.trials = Trials(self)
        self.check(seeds_of(self.stage.methods))

    def check(self, methods: Collection[str]) -> None:
        """Check that stages name methods, with the settings that these need, for these directions.

        Raises:
            ValueError: see `check_methods`; and if an exchange of masks leaves a pair its own, or gives it those of a
                pair that there is not.
        """
        check_methods(methods, self.method, self.pivot)
        if {self.kind(method) for method in methods} & {*WRONG_PAIR}:
            check_exchanged_pairs(self.language_pairs, as_mapping(self.method.exchange))

    def setting(self, method: str) -> Setting:
        """Return what a stage is trained with; see `Trials.setting`."""
        return self.trials.setting(method)

    def counts(self, measure: str = ACTIVITY) -> ActivationCounts:
        """Return the baseline's activity or attribution on the validation data, recorded once for all methods."""
        folder = identification_folder(self.directory, measure)
        path = folder / "counts.safetensors"
        with alone(self.directory, f"identification-{measure}"):
            if not path.is_file():
                started = time.perf_counter()
                options = {"measure": measure, "max_length": self.max_length, **self.convention()}
                recorded = record_corpus(self.baseline, self.tokenizer, self.data["validation"], **options)
                write_results(folder, {"seconds": time.perf_counter() - started})
                recorded.save(path)  # last: while it is missing, it is recorded and timed again
        return ActivationCounts.load(path)

    def weight_masks(self, alpha: float) -> dict[str, torch.Tensor]:
        """Return the masks of LaSS for all pairs: matrix → uint8 [pairs, out, ceil(in / 8)].

        They are made from models fine-tuned on one direction each, at the learning rate of "fine_tune_single" and left
        at their best validation loss. These are trained once, for all values of alpha and all seeds.
        """
        directory = identification_folder(self.directory, WEIGHTS)
        path = directory / f"masks-{alpha:g}.safetensors"
        with alone(self.directory, f"identification-{WEIGHTS}"):
            if not path.is_file():
                lass.save_masks(self._fine_tuned_weights(directory, alpha), path)
        return load_file(path)

    def shared_weight_masks(self, alpha: float) -> dict[str, torch.Tensor]:
        """Return one mask of LaSS for all pairs, made from the baseline as it is: pruning without specialization."""
        masks = lass.magnitude_masks(self.baseline, alpha)
        return {name: packed.repeat(len(self.language_pairs), 1, 1) for name, packed in masks.items()}

    def _exchanged(self, masks: dict[str, torch.Tensor], exchange: dict[str, str]) -> dict[str, torch.Tensor]:
        """Return the weight masks with each pair's in the place of another's, as `WrongPair` exchanges neurons."""
        order = [self.language_pairs.index(exchanged(pair, exchange)) for pair in self.language_pairs]
        return {name: packed[order] for name, packed in masks.items()}

    def _fine_tuned_weights(self, directory: Path, alpha: float) -> list[dict[str, torch.Tensor]]:
        """Return the weight masks of each pair, made from the model that is fine-tuned on it."""
        rate: Any = self.setting("fine_tune_single").learning_rate
        found, seconds = [], 0.0
        for pair in self.language_pairs:
            set_seed(0)
            model = lass.for_fine_tuning(self.baseline)
            spent = self.fit(model, [pair], 0, rate, self.stage.single_updates, directory / pair, accumulation=1)
            remove_checkpoints(directory / pair)
            found.append(lass.magnitude_masks(model, alpha))
            seconds += spent["seconds"]
        write_results(directory, {"seconds": seconds})
        return found

    def kind(self, method: str) -> str:
        """Return the method without a knob's value."""
        return parse_method(method, self.method)[0]

    def per_direction(self, method: str) -> bool:
        """Whether the method trains a model of its own for each direction."""
        return self.kind(method) in PER_DIRECTION

    def groups(self, method: str) -> list[list[str]]:
        """Return the directions of each model that the method trains."""
        return [[pair] for pair in self.language_pairs] if self.per_direction(method) else [self.language_pairs]

    def part_directory(self, directory: Path, method: str, pairs: Sequence[str]) -> Path:
        """Return where the model of one group of directions is kept in the directory of a stage or trial."""
        return directory / pairs[0] if self.per_direction(method) else directory

    def trained(
        self, method: str, seed: int, setting: Setting, pairs: list[str], updates: int, directory: Path
    ) -> tuple[Any, dict[str, Any]]:
        """Return the method's model, trained on `pairs` and left at its best validation loss, and what that took."""
        model = self.untrained(method, seed, setting.knobs)
        rate = setting.learning_rate
        if rate is None:
            return model, {"updates": 0, "seconds": 0.0}
        single = {"accumulation": 1} if self.per_direction(method) else {}
        callbacks = [GradualMasks(model, self.counts(), setting.knobs.k)] if self.kind(method) == "gradual" else []
        return model, self.fit(model, pairs, seed, rate, updates, directory, callbacks=callbacks, **single)

    def untrained(self, method: str, seed: int, knobs: MethodArguments) -> Any:
        """Return the model of a stage before its training.

        What it is made from comes first: making it draws from the random state that new weights are drawn from.
        """
        kind = self.kind(method)
        if kind in LASS:
            masks = self.shared_weight_masks(knobs.alpha) if kind == "lass_shared" else self.weight_masks(knobs.alpha)
            if kind == "lass_wrong_pair":
                masks = self._exchanged(masks, as_mapping(knobs.exchange))
            set_seed(seed)
            model = lass.lass(copy.deepcopy(self.baseline), masks, self.language_pairs, self.source_tag)
        else:
            counts = self.counts(IDENTIFIED_BY.get(kind, ACTIVITY))
            set_seed(seed)
            model = build_model(kind, self.baseline, counts, knobs, self.pivot, seed)
        return model.to(this_process().device)

    def fit(
        self,
        model: Any,
        pairs: list[str],
        seed: int,
        rate: float,
        updates: int,
        directory: Path,
        accumulation: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> dict[str, Any]:
        """Train a model on `pairs`, leave it at its best validation loss, and return what that took.

        The warm-up is as large a share of a shorter or longer run as of a joint one.
        """
        args = copy.deepcopy(self.training)
        args.output_dir, args.seed, args.data_seed = str(directory), seed, seed
        args.max_steps, args.learning_rate = updates, rate
        if args.warmup_steps >= 1:  # below 1 it is a share already
            args.warmup_steps = round(args.warmup_steps * updates / self.training.max_steps)
        args.eval_steps = args.save_steps = max(1, updates // self.stage.evaluations)
        args.gradient_accumulation_steps = accumulation or args.gradient_accumulation_steps
        train, validation = ({pair: self.data[split][pair] for pair in pairs} for split in ("train", "validation"))
        options = {"max_length": self.max_length, "callbacks": callbacks, **self.convention()}
        metrics = fit(model, self.tokenizer, train, validation, args, **options)
        losses = [[entry["step"], entry["eval_loss"]] for entry in metrics["log"] if "eval_loss" in entry]
        return {"updates": metrics["updates"], "seconds": metrics["train_runtime"], "validation_losses": losses}

    def updates(self, method: str) -> int:
        """Return the updates of a stage."""
        if self.kind(method) == "bilingual":
            return self.stage.bilingual_updates
        return self.stage.single_updates if self.per_direction(method) else self.training.max_steps

    def losses(self, model: Any, split: str, pairs: list[str]) -> dict[str, float]:
        """Return pair → loss in nats per token (see `token_losses`)."""
        rows = {pair: self.data[split][pair] for pair in pairs}
        return token_losses(
            model, self.tokenizer, rows, batch_size=self.training.per_device_eval_batch_size, **self.convention()
        )

    def convention(self) -> dict[str, Any]:
        """Return how text is tagged, for every function that encodes it."""
        return {"language_tokens": self.language_tokens, "source_tag": self.source_tag}
