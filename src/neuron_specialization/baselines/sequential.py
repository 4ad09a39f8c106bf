"""Run sequential transfer and what it is compared with in stages, each in a directory of its own.

After every stage every pair is evaluated. A stage that is done is skipped, one that was cut off goes on where it was.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import set_seed

from ..adapter.config import NeuronSpecializationConfig
from ..neurons.activations import ActivationCounts
from ..neurons.base_model import unwrap
from ..neurons.language_pairs import split_pair
from ..neurons.masks import NeuronMasks
from ..neurons.selection import CumulativeThreshold
from ..translation.checkpoints import freeze_unused_embedding
from ..translation.encoding import text_digest
from ..translation.evaluation import SCORES, check_lengths, check_scorers, evaluate
from ..translation.identification import record_corpus
from ..translation.messages import check_positive
from ..translation.noise import NoiseArguments, noisy_characters, substitute_words
from ..translation.processes import this_process
from ..translation.recording import corpus_batches, vocabulary_digest
from ..translation.results import write_results
from ..translation.runs import configuration, load_trained, tensor_digest
from ..translation.trainer import SpecializationTrainingArguments, check_max_steps, check_one_gpu
from ..translation.training import fit
from .folders import remove_checkpoints
from .freezing import NONE, frozen_parameters
from .scored_part import scored_part
from .settings import check_settings, shared_arguments
from .transfer_plan import (
    BILINGUAL,
    JOINT,
    MASKS,
    PART,
    PRETRAINING,
    ROBUSTNESS,
    SEQUENTIAL,
    SequentialArguments,
    Stage,
    orders_of,
    stages_of,
)

SETTINGS, COUNTS = "transfer.json", "counts.safetensors"


@dataclass
class SequentialTransfer:
    """Everything that all stages share.

    Attributes:
        model: the architecture, and the weights of pre-training's start if `pretrained`.
        tokenizer: its tokenizer.
        data: "train", "validation", "test" → pair → Dataset with columns "source" and "target".
        copying: "train", "validation" → source → source pair → Dataset, for pre-training.
        plan: orders, freezing, budget.
        noise: of the robustness test.
        training: arguments of the Trainer; each stage sets the output directory, seed and updates itself.
        language_tokens: language code → language token.
        source_tag: what the tag on the source side names.
        max_length: truncate training text, and what models are recorded on, to so many tokens.
        pretrained: whether `model` is a checkpoint to start from, rather than drawn anew for each seed.

    Raises:
        ImportError: if a target language needs a word segmenter that is not installed.
        ValueError: before any training, if orders, freezing or rates do not fit the pairs and the model, a test
            sentence is too long for it, clean or noisy, or the output directory holds stages with other settings.
    """

    model: Any
    tokenizer: Any
    data: Mapping[str, Mapping[str, Dataset]]
    copying: Mapping[str, Mapping[str, Dataset]]
    plan: SequentialArguments
    noise: NoiseArguments
    training: SpecializationTrainingArguments
    language_tokens: Mapping[str, str] | None = None
    source_tag: str = "source"
    max_length: int = 128
    pretrained: bool = False

    def __post_init__(self) -> None:
        check_one_gpu(self.training)
        check_max_steps(self.training)
        check_positive(evaluations=self.plan.evaluations)
        self.directory = Path(str(self.training.output_dir))
        self.language_pairs = list(self.data["train"])
        self.orders = orders_of(self.plan.orders, self.language_pairs)
        steps = len(self.language_pairs)
        unknown = sorted(set(self.plan.compare) - {JOINT, BILINGUAL, MASKS})
        if unknown and self.plan.compare != [NONE]:
            raise ValueError(f"compare takes any of joint, bilingual and masks, or none, got {', '.join(unknown)}.")
        if len(self.plan.freeze) not in (1, steps):
            raise ValueError(f"Expected one freeze for all steps, or one for each of {steps}, got {self.plan.freeze}.")
        self.freeze = self.plan.freeze * steps if len(self.plan.freeze) == 1 else self.plan.freeze
        for names in self.freeze:
            frozen_parameters(self.model, names)
        CumulativeThreshold(self.plan.k)
        check_scorers(split_pair(pair)[1] for pair in self.language_pairs)
        for held_out in (self.data["validation"], self.data["test"], self.noisy_test()):
            check_lengths(self.model, self.tokenizer, held_out, **self.convention(), losses=True)
        check_settings(
            self.directory, SETTINGS, self.settings(), {**vars(SequentialArguments()), **vars(NoiseArguments())}
        )

    def stages(self) -> list[Stage]:
        """Return every stage, each one after those that it starts from."""
        return stages_of(self.plan, self.orders, self.language_pairs)

    def run(self, stage: Stage) -> None:
        """Train and evaluate one stage, unless it is done; test its robustness if it is the last of its kind."""
        directory = self.directory / stage.path
        if not self.is_done(stage):
            model, spent = self._trained(stage)
            pairs = list(stage.trained) if stage.method == BILINGUAL else self.language_pairs
            part = self.evaluate(model, pairs, stage.about())
            remove_checkpoints(directory)
            # last: it says that the stage is done
            write_results(directory, {**part, "stage": {**stage.about(), **spent}}, PART)
        if self.is_final(stage) and not (directory / ROBUSTNESS).is_file():
            write_results(directory, self._robustness(stage), ROBUSTNESS)

    def is_done(self, stage: Stage) -> bool:
        """Whether a stage's results stand."""
        return (self.directory / stage.path / PART).is_file()

    def is_final(self, stage: Stage) -> bool:
        """Whether a stage's model is one that a user would take away."""
        return stage.method in (JOINT, BILINGUAL) or len(stage.trained) == len(self.language_pairs)

    def load(self, stage: Stage) -> Any:
        """Return the model of a stage that is done."""
        model = self._new(stage)
        load_trained(model, self._saved(stage))
        return model.eval()

    def fit(self, model: Any, directory: Path, pairs: Sequence[str], updates: int, seed: int = 0) -> dict[str, Any]:
        """Train a model on some pairs, or on text to copy, and leave it at its best validation loss.

        Args:
            model: with masks or without; what needs no gradient stays frozen.
            directory: where checkpoints and the model go; it is resumed from there.
            pairs: some of `language_pairs`, or all of `copying`.
            updates: optimizer updates.
            seed: of dropout and the order of batches.

        Returns:
            "updates" and "seconds".
        """
        args = copy.deepcopy(self.training)
        args.output_dir, args.seed, args.data_seed, args.max_steps = str(directory), seed, seed, updates
        args.eval_steps = args.save_steps = max(1, updates // self.plan.evaluations)
        text = {split: {**self.copying[split], **self.data[split]} for split in ("train", "validation")}
        train, validation = ({pair: of[pair] for pair in pairs} for of in text.values())
        metrics = fit(model, self.tokenizer, train, validation, args, max_length=self.max_length, **self.convention())
        return {"updates": metrics["updates"], "seconds": metrics["train_runtime"]}

    def evaluate(self, model: Any, pairs: Sequence[str], about: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is kept of a model, with rows that begin with `about`; see `scored_part`."""
        options = {"batch_size": self.training.per_device_eval_batch_size, "num_beams": self.plan.num_beams}
        return scored_part(model, self.tokenizer, self.data, pairs, about, **options, **self.convention())

    def scores(self, model: Any, rows: Mapping[str, Dataset]) -> dict[str, Any]:
        """Translate and score; see `evaluate` of `translation.evaluation`."""
        options = {**self.convention(), "batch_size": self.training.per_device_eval_batch_size}
        return evaluate(model, self.tokenizer, rows, num_beams=self.plan.num_beams, **options)

    def noisy_test(self) -> dict[str, Dataset]:
        """Return the test set of every pair with noisy characters on the source side."""
        texts = {pair: noisy_characters(list(rows["source"]), self.noise) for pair, rows in self.data["test"].items()}
        return {pair: self._with_sources(pair, sources) for pair, sources in texts.items()}

    def batches(
        self, model: Any, text: Mapping[str, Dataset] | None = None, tags: Sequence[str] = ()
    ) -> dict[str, DataLoader]:
        """Return batches to record a model on: of the validation data, or of other text (see `corpus_batches`)."""
        text = self.data["validation"] if text is None else text
        return corpus_batches(model, self.tokenizer, text, tags=tags, max_length=self.max_length, **self.convention())

    def convention(self) -> dict[str, Any]:
        """Return how languages are tagged, as the functions of `translation` take it."""
        return {"language_tokens": self.language_tokens, "source_tag": self.source_tag}

    def masks(self, seed: int) -> NeuronMasks:
        """Return each pair's neurons: the most active of the pre-trained model on validation data, recorded once."""
        path = self.directory / Stage(PRETRAINING, seed).path / COUNTS
        if not path.is_file():
            model = self.load(Stage(PRETRAINING, seed))
            options = {**self.convention(), "max_length": self.max_length}
            record_corpus(model, self.tokenizer, self.data["validation"], **options).save(path)
        return CumulativeThreshold(self.plan.k).select(ActivationCounts.load(path))

    def _new(self, stage: Stage) -> Any:
        """Return a stage's model before anything is loaded into it: drawn anew, and with masks where it has any."""
        set_seed(stage.seed)
        if self.pretrained and stage.method != BILINGUAL:
            model = copy.deepcopy(self.model)
        else:
            model = type(self.model)(copy.deepcopy(self.model.config))
            model.generation_config = copy.deepcopy(self.model.generation_config)
        if stage.method == MASKS:
            load_trained(model, self._saved(Stage(PRETRAINING, stage.seed)))
            options: dict[str, Any] = {"trainable": "full", "source_tag": self.source_tag, "task_type": "SEQ_2_SEQ_LM"}
            model = get_peft_model(model, NeuronSpecializationConfig(masks=self.masks(stage.seed), **options))
        freeze_unused_embedding(unwrap(model))
        return model.to(this_process().device)

    def _trained(self, stage: Stage) -> tuple[Any, dict[str, Any]]:
        model, start = self._new(stage), stage.start
        if start is not None and (start.method, stage.method) != (PRETRAINING, MASKS):
            load_trained(model, self._saved(start))
        if stage.method in (SEQUENTIAL, MASKS):
            self.freeze_step(model, len(stage.trained))
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        directory, updates = self.directory / stage.path, self._updates(stage)
        spent: dict[str, Any] = {"updates": 0, "seconds": 0.0}
        if updates:
            spent = self.fit(model, directory, self._pairs(stage), updates, stage.seed)
        else:  # of pre-training, whose model is what others start from all the same
            model.save_pretrained(directory / "model")
            self.tokenizer.save_pretrained(directory / "model")
        return model, {**spent, "trainable_parameters": trainable}

    def freeze_step(self, model: Any, step: int) -> None:
        """Freeze in a model, with masks or without, what the plan freezes in a step (from 1)."""
        for parameter in frozen_parameters(unwrap(model), self.freeze[step - 1]):
            parameter.requires_grad_(False)

    def _pairs(self, stage: Stage) -> list[str]:
        """Return the pairs that a stage trains on."""
        if stage.method == PRETRAINING:
            return list(self.copying["train"])
        return list(stage.trained if stage.method == JOINT else stage.trained[-1:])

    def _saved(self, stage: Stage) -> Path:
        return self.directory / stage.path / ("adapter" if stage.method == MASKS else "model")

    def _updates(self, stage: Stage) -> int:
        if stage.method == PRETRAINING:
            return self.plan.pretraining_updates
        return self.training.max_steps * (len(self.language_pairs) if stage.method == JOINT else 1)

    def _robustness(self, stage: Stage) -> dict[str, Any]:
        """Score the test set with noisy characters, and with the words that this model's gradient chooses."""
        model = self.load(stage)
        test = {pair: self.data["test"][pair] for pair in stage.trained}
        options = {**self.convention(), "batch_size": self.training.per_device_eval_batch_size}
        sources = {
            "characters": {pair: list(rows["source"]) for pair, rows in self.noisy_test().items() if pair in test},
            "words": {
                pair: substitute_words(model, self.tokenizer, rows, pair, self.noise.substitute, **options)
                for pair, rows in test.items()
            },
        }
        rows, translations = [], {}
        for kind, texts in sources.items():
            noisy = {pair: self._with_sources(pair, of) for pair, of in texts.items()}
            scored = self.scores(model, noisy)
            translations[kind] = scored["translations"]
            for pair, found in scored["directions"].items():
                rows.append({**stage.about(), "direction": pair, "noise": kind, **{s: found[s] for s in SCORES}})
        return {"rows": rows, "sources": sources, "translations": translations}

    def _with_sources(self, pair: str, sources: Sequence[str]) -> Dataset:
        return Dataset.from_dict({"source": list(sources), "target": list(self.data["test"][pair]["target"])})

    def settings(self) -> dict[str, Any]:
        """Return what every stage depends on: name → value that JSON can hold."""
        free = ("orders", "compare", "seeds")  # more of these may be run later
        return {
            "model": tensor_digest(self.model.state_dict().items()) if self.pretrained else configuration(self.model),
            "language_pairs": self.language_pairs,
            "sentences": {split: [len(rows) for rows in of.values()] for split, of in self.data.items()},
            "copied sentences": [len(rows) for rows in self.copying["train"].values()],
            "text": {split: text_digest(of) for split, of in self.data.items()},
            "vocabulary": vocabulary_digest(self.tokenizer),
            **{name: value for name, value in (vars(self.plan) | vars(self.noise)).items() if name not in free},
            **{**shared_arguments(self.training), "learning_rate": self.training.learning_rate},
            **{"max_length": self.max_length, **self.convention()},
        }
