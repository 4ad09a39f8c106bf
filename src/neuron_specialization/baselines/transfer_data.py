"""Text for sequential transfer: training data free of anything held out, and sentences to copy for pre-training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..neurons.language_pairs import split_pair
from ..translation.arguments import DataArguments
from ..translation.check import DataCheck, check_parallel, data_check_rows
from ..translation.checkpoints import load_checkpoint, new_checkpoint
from ..translation.noise import NoiseArguments, drop_words
from ..translation.trainer import SpecializationTrainingArguments
from .sequential import SETTINGS, SequentialTransfer
from .transfer_plan import SequentialArguments, StartArguments

ParallelText = Mapping[str, Dataset]
# what every recipe about sequential transfer takes, in the order of `load_transfer`
TRANSFER_ARGUMENTS = (
    *(SequentialArguments, NoiseArguments, StartArguments, DataArguments),
    SpecializationTrainingArguments,
)
# seeds are those of the plan, each of which seeds the initialization, dropout and the order of batches
UNUSED_ARGUMENTS = ("pivot", "patience", "eval_steps", "seed", "data_seed", "overwrite_output_dir")


def settings_of(*arguments: Any) -> dict[str, dict[str, Any]]:
    """Return the arguments of `TRANSFER_ARGUMENTS` as results.json keeps them: name of a part → option → value."""
    *parts, training = arguments
    names = ("plan", "noise", "start", "data")
    return {**{name: vars(part) for name, part in zip(names, parts, strict=True)}, "training": training.to_dict()}


def check_against_all(
    train: ParallelText, held_out: list[ParallelText], drop: bool = False
) -> tuple[dict[str, Dataset], dict[str, DataCheck]]:
    """Check each pair's training data against the held-out data of all pairs; see `check_parallel`.

    A model that learns one pair after another has seen the source side of them all.
    """
    everywhere = [{pair: rows for pair in train} for corpus in held_out for rows in corpus.values()]
    return check_parallel(train, everywhere, drop)


def sentences_to_copy(
    train: ParallelText, held_out: list[ParallelText], word_dropout: float = 0.0
) -> dict[str, Dataset]:
    """Return monolingual pairs, such as "en-en": all source sentences, each once, with themselves as target.

    Args:
        train: pair → Dataset with columns "source" and "target".
        held_out: likewise; their source sentences are left out.
        word_dropout: share of the words left out of the source side.

    Raises:
        ValueError: if the rate is not in [0, 1), or nothing is left.
    """
    reserved = {sentence for corpus in held_out for rows in corpus.values() for sentence in rows["source"]}
    found: dict[str, dict[str, None]] = {}
    for pair, rows in train.items():
        language, _ = split_pair(pair)
        sentences = dict.fromkeys(sentence for sentence in rows["source"] if sentence not in reserved)
        found.setdefault(f"{language}-{language}", {}).update(sentences)
    empty = [pair for pair, sentences in found.items() if not sentences]
    if empty:
        raise ValueError(f"No sentence is left to copy for {', '.join(empty)}: all of them are held out.")
    return {
        pair: Dataset.from_dict({"source": drop_words(list(sentences), word_dropout), "target": list(sentences)})
        for pair, sentences in found.items()
    }


def load_transfer(
    plan: SequentialArguments,
    noise: NoiseArguments,
    start: StartArguments,
    data: DataArguments,
    training: SpecializationTrainingArguments,
) -> tuple[SequentialTransfer, list[dict[str, Any]]]:
    """Load and check the text, and make or load the model that everything starts from.

    Returns:
        The transfer, in the output directory of `training`, and the rows of the data check's table.
    """
    held_out: list[ParallelText] = [data.load("validation"), data.load("test")]
    train, checks = check_against_all(data.load("train"), held_out, data.drop_faulty)
    copying = {
        "train": sentences_to_copy(train, held_out, plan.word_dropout),
        "validation": sentences_to_copy(held_out[0], held_out[1:], plan.word_dropout),
    }
    if start.model_name_or_path:
        model, tokenizer = load_checkpoint(start.model_name_or_path, "float32")
    else:
        model, tokenizer = new_checkpoint(train, data.tokens, start, data.max_length)
    text = {"train": train, "validation": held_out[0], "test": held_out[1]}
    options = (data.tokens, data.source_tag, data.max_length, bool(start.model_name_or_path))
    return SequentialTransfer(model, tokenizer, text, copying, plan, noise, training, *options), data_check_rows(
        checks
    )


def load_finished(transfer_dir: str, *arguments: Any) -> tuple[SequentialTransfer, Path]:
    """Return the transfer whose stages a directory holds, to work on its models, and the output directory for that.

    Args:
        transfer_dir: the output directory of the transfer.
        *arguments: those of `TRANSFER_ARGUMENTS`, as the transfer was run with.

    Raises:
        ValueError: if there is no transfer, or it was run with other settings.
    """
    if not (Path(transfer_dir) / SETTINGS).is_file():
        raise ValueError(f"{transfer_dir} holds no stages: run transfer_sequentially.py first.")
    training = arguments[-1]
    output, training.output_dir = Path(training.output_dir), transfer_dir
    return load_transfer(*arguments)[0], output
