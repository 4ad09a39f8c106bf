"""Tasks of cross-lingual understanding: train on labeled text of one language, test on the same items in others."""

import dataclasses
import hashlib
import json
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from .data_files import FORMATS, read_rows

KINDS = ("classification", "tagging")


@dataclass(frozen=True)
class Examples:
    """Labeled text in one language.

    Attributes:
        items: names of the n examples; examples of two languages with one name are translations of each other.
        texts: per example: its one or two texts (classification), or its words (tagging).
        labels: per example: its one label (classification), or one per word (tagging), as positions in `Task.labels`.
    """

    items: list[str]
    texts: list[list[str]]
    labels: list[list[int]]


@dataclass(frozen=True)
class Task:
    """A task, loaded and checked.

    Attributes:
        name: name of the task.
        kind: "classification" or "tagging".
        source: language of the training data.
        labels: names of the labels.
        train: training data.
        test: language → test data, the source language first. Languages may lack items, but add none.
        text_end: where items come from running texts, what ends the text's name in an item's.
    """

    name: str
    kind: str
    source: str
    labels: list[str]
    train: Examples
    test: dict[str, Examples]
    text_end: str | None = None

    def digest(self) -> str:
        """Return a digest of the whole task."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()


@dataclass(frozen=True)
class TaskDescription:
    """Where a task's data is. "{language}" in `train`, `test`, `config` and `text` stands for each language.

    Attributes:
        kind: "classification" or "tagging".
        train: training data: a .parquet, .jsonl or .tsv file, a dataset on the Hub, or the directory with its
            README.md that one was downloaded to.
        test: test data.
        text: column of the text; for classification of pairs the two columns; for tagging the column of word lists.
        label: column of the label, or, for tagging, of the list of labels.
        languages: languages to test on.
        config: configuration of a dataset on the Hub.
        train_split: rows to train on, where a file has a column "split", or split of a dataset on the Hub.
        test_split: likewise for the test.
        id: column that names items; by default row i of one language is the translation of row i of the others.
        text_end: where items come from running texts, what ends the text's name in an item's: with ":", the verse
            "GEN 1:1" is from "GEN 1". Intervals and tests then draw whole texts.
        label_groups: group → words. The label is then the group of the label column's first word: with
            {"Law": "GEN EXO"}, that of the verse "GEN 1:1" is "Law".
    """

    kind: str
    train: str
    test: str
    text: str | list[str]
    label: str
    languages: list[str]
    config: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    id: str | None = None
    text_end: str | None = None
    label_groups: dict[str, str] = field(default_factory=dict)


def load_tasks(
    described: Mapping[str, Mapping[str, Any]],
    source: str = "en",
    *,
    directory: str | None = None,
    languages: Sequence[str] = (),
    apart: Sequence[str] = (),
    max_train_examples: int | None = None,
    max_test_items: int | None = None,
) -> list[Task]:
    """Load tasks, and check everything that can be wrong with their data.

    Args:
        described: name of the task → fields of `TaskDescription`.
        source: language to train on.
        directory: where paths of files start from.
        languages: test on these languages only; by default on all that a task has.
        apart: languages that will be reported apart; a task needs another one besides the source language.
        max_train_examples: train on at most this many examples, drawn at random, the same in every call.
        max_test_items: likewise for testing; the same items in every language.

    Raises:
        ValueError: if a description or a file does not fit, no task has one of the languages, a column is missing, a
            label does not occur in the training data, words and tags differ in number, or two languages' examples are
            not translations.
    """
    if not described:
        raise ValueError("Expected at least one task under `tasks:` in the configuration file.")
    descriptions = {name: _description(name, fields) for name, fields in described.items()}
    known = {code for each in descriptions.values() for code in each.languages}
    if unknown := [code for code in (*languages, *apart) if code not in known]:
        raise ValueError(f"No task has the language {unknown[0]!r}; they have {', '.join(sorted(known))}.")
    tasks = []
    for name, description in descriptions.items():
        loader = _Loader(name, description, directory)
        tasks.append(loader.load(source, languages, apart, max_train_examples, max_test_items))
    return tasks


def _description(name: str, fields: Mapping[str, Any]) -> TaskDescription:
    known = dataclasses.fields(TaskDescription)
    if not isinstance(fields, Mapping):
        raise ValueError(f"Task {name}: expected lines such as `kind: classification`, got {fields!r}.")
    required = [each.name for each in known[:6]]
    wrong = [*(key for key in fields if key not in {each.name for each in known})]
    absent = [key for key in required if key not in fields]
    if wrong or absent:
        raise ValueError(
            f"Task {name}: {f'unknown {wrong[0]!r}' if wrong else f'{absent[0]!r} is missing'}. Expected "
            f"{', '.join(required)}, and where needed {', '.join(each.name for each in known[6:])}."
        )
    description = TaskDescription(**fields)
    texts = 1 if isinstance(description.text, str) else len(description.text)
    if description.kind not in KINDS or texts > (2 if description.kind == "classification" else 1) or not texts:
        raise ValueError(
            f"Task {name}: expected `kind: classification` with one or two text columns, or `kind: tagging` with one, "
            f"got {description.kind!r} with {texts}."
        )
    return description


class _Loader:
    """Reads one task. Rows without text in a language are left out there; every other fault is an error."""

    def __init__(self, name: str, description: TaskDescription, directory: str | None) -> None:
        self.name, self.described, self.directory = name, description, directory
        self.groups = {word: group for group, words in description.label_groups.items() for word in words.split()}

    def load(
        self, source: str, only: Sequence[str], apart: Sequence[str], max_train: int | None, max_test: int | None
    ) -> Task:
        described = self.described
        if source not in described.languages:
            raise ValueError(
                f"Task {self.name} has no test data in the source language {source!r}, which every other is compared "
                f"with; its languages are {', '.join(described.languages)}."
            )
        others = [code for code in described.languages if code != source and (not only or code in only)]
        if not set(others) - set(apart):
            raise ValueError(
                f"Task {self.name}: expected a language to test on besides {source!r}, and one that is not set apart; "
                f"got {', '.join(others) or 'none'}."
            )
        training = self._read(source, described.train, described.train_split)
        # of all training data: a rare label may be in none of the examples drawn from it
        names = sorted({label for text, labels in zip(*training[1:], strict=True) if text for label in labels})
        train = self._sample(*training, max_train)
        if missing := set(names) - {label for labels in train[2] for label in labels}:
            warnings.warn(
                f"Task {self.name}: none of the {len(train[0])} examples drawn has the label "
                f"{', '.join(sorted(missing))}.",
                stacklevel=2,
            )
        tests = {code: self._read(code, described.test, described.test_split) for code in (source, *others)}
        for code, test in tests.items():
            self._check_aligned(source, tests[source], code, test)
        chosen = set(self._sample(*tests[source], max_test)[0])
        kept = {code: self._only(test, chosen) for code, test in tests.items()}
        numbered = {code: self._numbered(code, test, names) for code, test in kept.items()}
        numbered_train = self._numbered(source, train, names)
        return Task(self.name, described.kind, source, names, numbered_train, numbered, described.text_end)

    def _read(self, language: str, path: str, split: str) -> tuple[list[str], list[list[str] | None], list[list[str]]]:
        """Return items, texts (None: missing in this language) and labels of one language."""
        described = self.described
        rows, where = self._table(language, path, split)
        texts = [described.text] if isinstance(described.text, str) else described.text
        columns = [text.replace("{language}", language) for text in texts]
        self._check_columns(rows, where, [*columns, described.label, *([described.id] if described.id else [])])
        items = list(map(str, rows[described.id])) if described.id else [f"row {i}" for i in range(len(rows))]
        if len(set(items)) < len(items):
            raise ValueError(f"Task {self.name}: two rows of {where} have the same {described.id}.")
        labels, found = list(rows[described.label]), [list(rows[column]) for column in columns]
        if described.kind == "tagging":
            self._check_tags(where, items, found[0], labels)
            return items, found[0], [list(map(str, tags or ())) for tags in labels]
        segments = [list(row) if all(row) else None for row in zip(*found, strict=True)]
        return items, segments, [[self._label(label, where)] for label in labels]

    def _table(self, language: str, path: str, split: str) -> tuple[Dataset, str]:
        place = path.replace("{language}", language)
        if self.directory is not None and place.removesuffix(".gz").endswith(tuple(FORMATS.split(", "))):
            place = f"{self.directory}/{place}"
        config = self.described.config and self.described.config.replace("{language}", language)
        downloaded = (Path(place) / "README.md").is_file()
        rows = None if downloaded else read_rows(place, True)
        if rows is None:
            rows = self._from_hub(place, config, split)
        elif "split" in rows.column_names:
            rows = rows.filter(lambda value: value == split, input_columns="split")
        elif self.described.train == self.described.test:
            raise ValueError(
                f"Task {self.name}: {place} is both training and test data, and has no column 'split' that tells them "
                "apart."
            )
        if not len(rows):
            raise ValueError(f"Task {self.name}: {place} has no rows of the split {split!r}.")
        return rows, place

    def _from_hub(self, place: str, config: str | None, split: str) -> Dataset:
        try:
            return load_dataset(place, config, split=split)
        except Exception as error:
            raise ValueError(
                f"Task {self.name}: cannot load {place!r}: expected a file ending in {FORMATS} or the name of a "
                f"dataset on the Hub ({type(error).__name__}: {error})."
            ) from error

    def _check_columns(self, rows: Dataset, where: str, columns: Sequence[str]) -> None:
        missing = [column for column in columns if column not in rows.column_names]
        if missing:
            raise ValueError(
                f"Task {self.name}: {where} has no column {missing[0]!r}; it has {', '.join(rows.column_names)}."
            )

    def _check_tags(self, where: str, items: list[str], words: list, tags: list) -> None:
        for item, w, t in zip(items, words, tags, strict=True):
            if not isinstance(w, list | None) or not isinstance(t, list | None):
                raise ValueError(f"Task {self.name}: {where}: expected lists of words and of tags, got {w!r}, {t!r}.")
            if w is not None and len(w) != len(t or ()):
                raise ValueError(f"Task {self.name}: {where}: {item} has {len(w)} words but {len(t or ())} tags.")

    def _label(self, value: Any, where: str) -> str:
        if value is None:
            raise ValueError(f"Task {self.name}: {where}: a label is missing.")
        if not self.groups:
            return str(value)
        first = str(value).split()[0]
        if first not in self.groups:
            raise ValueError(f"Task {self.name}: {where}: {value!r} belongs to no group of label_groups.")
        return self.groups[first]

    def _check_aligned(self, source: str, expected: tuple, language: str, found: tuple) -> None:
        known = dict(zip(expected[0], expected[2], strict=True))
        if known.keys() != set(found[0]):
            odd = min(known.keys() ^ set(found[0]))
            raise ValueError(
                f"Task {self.name}: the test data of {language} and {source} do not align: {odd!r} is in one of them "
                "only. Expected the same items in every language."
            )
        if self.described.kind == "tagging":
            return
        for item, labels in zip(found[0], found[2], strict=True):
            if labels != known[item]:
                raise ValueError(
                    f"Task {self.name}: the test data of {language} and {source} do not align: {item!r} has the label "
                    f"{labels[0]!r} in one and {known[item][0]!r} in the other."
                )

    @staticmethod
    def _sample(items: list, texts: list, labels: list, limit: int | None) -> tuple[list, list, list]:
        present = [i for i, text in enumerate(texts) if text]
        if limit is not None and limit < len(present):
            present = sorted(random.Random(0).sample(present, limit))
        return [items[i] for i in present], [texts[i] for i in present], [labels[i] for i in present]

    @staticmethod
    def _only(rows: tuple[list, list, list], chosen: set[str]) -> tuple[list, list, list]:
        kept = [row for row in zip(*rows, strict=True) if row[1] and row[0] in chosen]
        return [row[0] for row in kept], [row[1] for row in kept], [row[2] for row in kept]

    def _numbered(self, language: str, rows: tuple[list, list, list], names: list[str]) -> Examples:
        numbers = {name: i for i, name in enumerate(names)}
        unseen = sorted({label for labels in rows[2] for label in labels} - numbers.keys())
        if unseen:
            raise ValueError(
                f"Task {self.name}: the label {unseen[0]!r} of the {language} test data does not occur in the "
                f"training data, whose labels are {', '.join(names)}."
            )
        if not rows[0]:
            raise ValueError(f"Task {self.name}: no text in {language!r}.")
        return Examples(rows[0], rows[1], [[numbers[label] for label in labels] for labels in rows[2]])
