"""Options that several recipes share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from ..neurons.language_pairs import check_pairs, split_pair
from .check import check_parallel, data_check_rows, warn_of_empty_sides
from .data import load_parallel
from .data_files import FORMATS
from .messages import check_positive


@dataclass
class ModelArguments:
    """The model to start from."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint directory or Hub id of a seq2seq model."})
    adapter: str | None = field(default=None, metadata={"help": "Adapter directory or Hub id."})


@dataclass
class ShapeArguments:
    """The shape of a new model."""

    vocab_size: int = field(default=8000, metadata={"help": "Entries of a new model's shared BPE."})
    layers: int = field(default=6, metadata={"help": "Layers of a new model's encoder, and of its decoder."})
    d_model: int = field(default=512, metadata={"help": "Width of a new model."})
    d_ff: int = field(default=2048, metadata={"help": "FFN neurons per layer of a new model."})
    heads: int = field(default=8, metadata={"help": "Attention heads of a new model."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout of a new model."})
    activation: str = field(default="relu", metadata={"help": "Activation of a new model's FFNs, such as gelu."})
    tie_embeddings: bool = field(
        default=True, metadata={"help": "Encoder, decoder and output of a new model share one embedding."}
    )


@dataclass
class DataArguments:
    """Parallel text, and how its languages are named."""

    language_pairs: list[str] = field(default_factory=list, metadata={"help": "Directions, such as en-de de-en."})
    train_file: str | None = field(
        default=None, metadata={"help": "Training data: file, or dataset on the Hub (NAME or NAME:CONFIGURATION)."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Validation data."})
    test_file: str | None = field(default=None, metadata={"help": "Test data."})
    splits: list[str] = field(
        default_factory=list,
        metadata={"help": "Names of splits in the data, where they differ, such as validation=dev."},
    )
    columns: list[str] = field(default_factory=list, metadata={"help": "code=column, where they differ."})
    language_tokens: list[str] = field(default_factory=list, metadata={"help": "code=token, such as de=deu_Latn."})
    source_tag: str = field(default="source", metadata={"help": "What the source side's tag names: source or target."})
    pivot: str | None = field(default=None, metadata={"help": "Language of the one-to-many and many-to-one averages."})
    max_length: int = field(default=128, metadata={"help": "Cut text to train on or record to so many tokens."})
    max_sentences: int | None = field(
        default=None,
        metadata={"help": "Most pairs per direction, of training text if read."},
    )
    max_characters: int | None = field(
        default=None, metadata={"help": "Leave out sentence pairs of which either side is longer, in every split."}
    )
    train_sentences: list[str] = field(
        default_factory=list, metadata={"help": "code=number: maximum of training sentence pairs with that language."}
    )
    document_column: str | None = field(
        default=None,
        metadata={"help": "Column such as 'GEN 1:1': training data is limited to whole documents (GEN 1)."},
    )
    drop_faulty: bool = field(
        default=False, metadata={"help": "Drop what the data check finds, instead of reporting."}
    )

    def load(self, split: str, **changes: Any) -> dict[str, Dataset]:
        """Load every direction of one split: "train" (within its limits), "validation" or "test".

        Raises:
            ValueError: if the command line names no data for that split.
        """
        path = getattr(self, f"{split}_file")
        if path is None:
            raise ValueError(
                f"Pass the {split} data: --{split}_file FILE ({FORMATS}, or plain text as train.{{lang}}) or a "
                "dataset on the Hub."
            )
        limits = {"max_sentences": self._limits(), "document_column": self.document_column} if split == "train" else {}
        options = {
            "split": as_mapping(self.splits).get(split, split),
            "columns": self.column_names,
            "max_characters": self.max_characters,
            **limits,
            **changes,
        }
        loaded = load_parallel(path, self.language_pairs, **options)
        if split != "train":  # of training data the check tells
            warn_of_empty_sides(loaded, split)
        return loaded

    def load_checked(self) -> tuple[dict[str, Dataset], dict[str, Dataset], list[dict[str, Any]]]:
        """Load training and validation data, and check the former against all held-out data there is.

        Returns:
            Training data, validation data, and the rows of the data check's table.
        """
        validation = self.load("validation")
        held_out = [validation] + ([self.load("test")] if self.test_file is not None else [])
        train, checks = check_parallel(self.load("train"), held_out, drop=self.drop_faulty)
        return train, validation, data_check_rows(checks)

    def _limits(self) -> dict[str, int]:
        """Return pair → maximum of training sentence pairs, where there is one."""
        pairs = check_pairs(self.language_pairs)
        given = as_mapping(self.train_sentences)
        languages = {code for pair in pairs for code in split_pair(pair)}
        if unknown := [code for code in given if code not in languages]:
            raise ValueError(
                f"train_sentences limits {', '.join(unknown)}, a language of no pair: {', '.join(sorted(languages))}."
            )
        of_language = {code: int(number) if number.isdecimal() else 0 for code, number in given.items()}
        if wrong := [f"{code}={given[code]}" for code, number in of_language.items() if number < 1]:
            raise ValueError(f"train_sentences takes numbers of at least 1, such as de=3000; got {' '.join(wrong)}.")
        if self.max_sentences is not None:
            check_positive(max_sentences=self.max_sentences)
        limits = {}
        for pair in pairs:
            bounds = [self.max_sentences, *(of_language.get(code) for code in split_pair(pair))]
            if any(bound is not None for bound in bounds):
                limits[pair] = min(bound for bound in bounds if bound is not None)
        return limits

    @property
    def column_names(self) -> dict[str, str]:
        """Language code → column."""
        return as_mapping(self.columns)

    @property
    def tokens(self) -> dict[str, str]:
        """Language code → language token."""
        return as_mapping(self.language_tokens)


def as_mapping(words: Sequence[str]) -> dict[str, str]:
    """Return `["de=deu_Latn"]` as `{"de": "deu_Latn"}`.

    Raises:
        ValueError: if a word is not of this form, or two give one name.
    """
    pairs = [word.split("=", 1) for word in words]
    wrong = [word for word, pair in zip(words, pairs, strict=True) if len(pair) != 2]
    if wrong:
        raise ValueError(f"Expected name=value, such as de=deu_Latn, got {' '.join(wrong)}.")
    found: dict[str, str] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is named twice in {' '.join(words)}.")
        found[name] = value
    return found
