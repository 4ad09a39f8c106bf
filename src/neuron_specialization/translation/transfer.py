"""Cross-lingual transfer: heads trained on one language and tested on every language, with controls, resumable."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoTokenizer, TrainingArguments

from ..neurons.base_model import number_of_positions
from ..neurons.files import replacing
from .arguments import as_mapping
from .encoder_heads import HeadTraining, train_and_predict
from .encoders import (
    cache_states,
    check_has_encoder,
    encode_examples,
    language_tag,
    load_encoder,
    random_encoder,
    subwords,
)
from .text_files import weights_of
from .trainer import check_one_gpu
from .understanding import Task

PROBING, FINE_TUNING, CONTROL = "probing", "fine_tuning", "control"
RANDOM, MAJORITY, BAG_OF_SUBWORDS = "random", "majority", "bag_of_subwords"
CONTROLS = (RANDOM, MAJORITY, BAG_OF_SUBWORDS)


@dataclass(frozen=True)
class Predictions:
    """What one head, or a control, predicted on a task's test data.

    Attributes:
        model: name of the model, or of the control: "random", "majority" or "bag_of_subwords".
        task: name of the task.
        mode: "probing", "fine_tuning", or "control" for what trains no head.
        seed: seed of the head.
        labels: language → predicted label of every unit of the test data, one example after another, int16.
    """

    model: str
    task: str
    mode: str
    seed: int
    labels: dict[str, np.ndarray]


def transfer(
    models: Mapping[str, str],
    tasks: Sequence[Task],
    training: Mapping[str, HeadTraining],
    directory: str | Path,
    *,
    seeds: int = 5,
    language_tokens: Mapping[str, str] | None = None,
    max_length: int = 128,
) -> list[Predictions]:
    """Train heads on every model and task, and the controls.

    Controls: the most frequent label, a naive Bayes classifier of subwords, and heads on a randomly initialized
    encoder, another one for each seed; the latter two with the tokenizer and the architecture of the first model.

    Predictions are written to `directory` as each head is finished, and a finished head is not trained again.

    Args:
        models: name → checkpoint directory or Hub id.
        tasks: what `load_tasks` returns.
        training: mode, "probing" or "fine_tuning" → how to train.
        directory: where predictions go, one file per head.
        seeds: number of heads per model, task and mode.
        language_tokens: language code → language token, see `language_tag`.
        max_length: longest input in tokens.

    Raises:
        ValueError: before any training, if a model has no encoder or no language token for the source language, or the
            directory holds predictions made with other settings.
    """
    check_one_gpu(TrainingArguments(str(directory), report_to="none"))
    check_models(models)
    _check_languages(models, tasks, language_tokens or {})
    first = next(iter(models.values()))
    locations = {**models, RANDOM: first}
    stores = {
        (name, task.name, mode): _Store(
            Path(directory),
            (name, task.name, mode),
            {
                "model": location,
                "weights": weights_of(location) or AutoConfig.from_pretrained(location)._commit_hash,  # of the Hub
                "task": task.digest(),
                "training": dataclasses.asdict(how),
                "language_tokens": dict(language_tokens or {}),
                "max_length": max_length,
            },
        )
        for name, location in locations.items()
        for task in tasks
        for mode, how in training.items()
    }
    done = [found for store in stores.values() for seed in range(seeds) if (found := store.load(seed)) is not None]
    finished = {(each.model, each.task, each.mode, each.seed) for each in done}
    options = language_tokens or {}, max_length
    for name, location in locations.items():
        missing = [
            (task, mode, [seed for seed in range(seeds) if (name, task.name, mode, seed) not in finished])
            for task in tasks
            for mode in training
        ]
        if not any(wanted for _, _, wanted in missing):
            continue
        encoder = random_encoder(location, 0) if name == RANDOM else load_encoder(location)
        tokenizer = AutoTokenizer.from_pretrained(location)
        for task, mode, wanted in missing:
            heads = _Heads(task, encoder, tokenizer, *options)
            drawn_from = location if name == RANDOM else None
            for seed, labels in heads.train(training[mode], mode == PROBING, wanted, drawn_from):
                found = Predictions(name, task.name, mode, seed, labels)
                stores[name, task.name, mode].save(found)
                done.append(found)
    return done + list(_untrained_controls(first, tasks))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint among those of one name, which differ in their seed.

    Attributes:
        name: of the model, or of the condition that it was trained under; "random" is the control.
        seed: its number among the checkpoints of that name, from 0.
        label: the name, with the seed where there are several of that name.
        location: directory or Hub id; of the control, that of the model whose architecture it has.
    """

    name: str
    seed: int
    label: str
    location: str

    @property
    def is_control(self) -> bool:
        """Whether the weights are drawn at random."""
        return self.name == RANDOM


def named_checkpoints(words: Sequence[str]) -> list[Checkpoint]:
    """Return the checkpoints that `name=checkpoint` words name; a name may be given several times.

    Raises:
        ValueError: if there is none, a word is no such pair, two labels are the same, or a checkpoint has no encoder.
    """
    pairs = [pair for word in words for pair in as_mapping([word]).items()]
    names = [name for name, _ in pairs]
    found = []
    for i, (name, location) in enumerate(pairs):
        seed = names[:i].count(name)
        found.append(Checkpoint(name, seed, f"{name}-{seed}" if names.count(name) > 1 else name, location))
    check_models({each.label: each.location for each in found})
    if len({each.label for each in found}) < len(found) or names.count(names[0]) > 1:
        raise ValueError(f"Expected other names than {' '.join(names)}: the first, the source, is one checkpoint.")
    return found


def check_models(models: Mapping[str, str]) -> None:
    """Refuse models that cannot be compared.

    Raises:
        ValueError: if there is none, a name is that of a control or no file name, or a checkpoint has no encoder.
    """
    if not models:
        raise ValueError("Expected models to compare, such as --models before=PATH after=PATH.")
    for name, location in models.items():
        if name in CONTROLS or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise ValueError(
                f"{name!r} cannot name a model: expected letters, digits, - . and _, and not {', '.join(CONTROLS)}."
            )
        check_has_encoder(location)


def _check_languages(models: Mapping[str, str], tasks: Sequence[Task], tokens: Mapping[str, str]) -> None:
    """Look up every language token before any training, and print which languages have none."""
    for name, location in models.items():
        tokenizer = AutoTokenizer.from_pretrained(location)
        for task in tasks:
            tags = {code: language_tag(tokenizer, code, task.source, tokens) for code in task.test}
            without = [code for code in tags if code != task.source and tags[code] == tags[task.source] is not None]
            if without:
                print(
                    f"{name}, {task.name}: {', '.join(without)} have no language token; encoded with that of "
                    f"{task.source}, {tags[task.source]}",
                    file=sys.stderr,
                )


class _Heads:
    """The heads of one model and task, with what they share: tokens, and states if the encoder is frozen."""

    def __init__(
        self, task: Task, encoder: Any, tokenizer: Any, language_tokens: Mapping[str, str], max_length: int
    ) -> None:
        self.task, self.encoder = task, encoder
        tagging = task.kind == "tagging"
        tags = {code: language_tag(tokenizer, code, task.source, language_tokens) for code in task.test}
        longest = min(max_length, tokenizer.model_max_length, number_of_positions(encoder) or max_length)
        self.rows = {
            code: encode_examples(tokenizer, examples, tagging, tags[code], longest)
            for code, examples in task.test.items()
        }
        self.train_rows = encode_examples(tokenizer, task.train, tagging, tags[task.source], longest)

    def train(
        self, how: HeadTraining, probing: bool, seeds: Iterable[int], drawn_from: str | None
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield seed and predictions; with `drawn_from`, on an untrained encoder, a different one for each seed."""
        cached = None
        for seed in seeds:
            encoder = random_encoder(drawn_from, seed) if drawn_from else self.encoder
            if cached is None or drawn_from:
                cached = self._inputs(encoder, how.pooling, probing)
            yield seed, train_and_predict(encoder, *cached, len(self.task.labels), how, seed)

    def _inputs(self, encoder: Any, pooling: str, probing: bool) -> tuple[Any, Any]:
        if not probing:
            return self.train_rows, self.rows
        tests = {code: cache_states(encoder, rows, pooling) for code, rows in self.rows.items()}
        return cache_states(encoder, self.train_rows, pooling), tests


def _untrained_controls(location: str, tasks: Sequence[Task]) -> Iterator[Predictions]:
    """Yield what the most frequent training label and naive Bayes on subwords predict; they take seconds."""
    tokenizer = AutoTokenizer.from_pretrained(location)
    for task in tasks:
        frequent = np.bincount([label for labels in task.train.labels for label in labels]).argmax()
        majority = {code: np.full(sum(map(len, test.labels)), frequent, np.int16) for code, test in task.test.items()}
        yield Predictions(MAJORITY, task.name, CONTROL, 0, majority)
        yield Predictions(BAG_OF_SUBWORDS, task.name, CONTROL, 0, bag_of_subwords(task, tokenizer))


def bag_of_subwords(task: Task, tokenizer: Any) -> dict[str, np.ndarray]:
    """Return what multinomial naive Bayes with add-one smoothing predicts from the subwords of a text, or of a word.

    Returns:
        Language → predicted labels, as in `Predictions`.
    """
    tagging = task.kind == "tagging"

    def bags(examples: Any) -> list[list[int]]:
        parts = subwords(tokenizer, examples, tagging)
        return [part for row in parts for part in row] if tagging else [sum(row, []) for row in parts]

    train = bags(task.train)
    tests = {code: bags(examples) for code, examples in task.test.items()}
    size = 1 + max((i for found in (train, *tests.values()) for bag in found for i in bag), default=0)
    counts, prior = np.ones((len(task.labels), size)), np.zeros(len(task.labels))
    for bag, label in zip(train, (label for labels in task.train.labels for label in labels), strict=True):
        np.add.at(counts[label], bag, 1)
        prior[label] += 1
    logs = np.log(counts / counts.sum(1, keepdims=True))
    start = np.log(prior / prior.sum())
    return {
        code: np.array([(start + logs[:, bag].sum(1)).argmax() for bag in found], np.int16)
        for code, found in tests.items()
    }


class _Store:
    """Predictions of one model, task and mode on disk: a file per seed, which says what it depends on."""

    def __init__(self, directory: Path, cell: tuple[str, str, str], depends_on: Mapping[str, Any]) -> None:
        self.directory, self.cell = directory, cell
        self.depends_on = json.loads(json.dumps(depends_on))

    def load(self, seed: int) -> Predictions | None:
        """Return predictions made before, or None.

        Raises:
            ValueError: if they were made with other settings.
        """
        path = self._path(seed)
        if not path.is_file():
            return None
        with safe_open(path, "numpy") as file:
            before = json.loads(file.metadata()["depends_on"])
            labels = {code: file.get_tensor(code) for code in file.keys()}
        changed = [name for name in self.depends_on if before.get(name) != self.depends_on[name]]
        if changed:
            raise ValueError(
                f"{path} was made with other settings ({', '.join(changed)}). Repeat those to continue, or choose "
                "another --output_dir."
            )
        return Predictions(*self.cell, seed, labels)

    def save(self, found: Predictions) -> None:
        """Write the file atomically."""
        with replacing(self._path(found.seed)) as partial:
            save_file(found.labels, partial, {"depends_on": json.dumps(self.depends_on)})
        print(f"finished {found.task}, {found.mode}, {found.model}, seed {found.seed}", file=sys.stderr, flush=True)

    def _path(self, seed: int) -> Path:
        model, task, mode = self.cell
        return self.directory / task / f"{model}-{mode}-{seed}.safetensors"
