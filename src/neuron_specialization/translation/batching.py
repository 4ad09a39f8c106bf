"""Batches of one direction each, drawn with temperature or one after another; and their tensors."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from ..adapter.target_tag import label_shift
from ..neurons.base_model import unwrap
from ..neurons.positions import IGNORED

_POOL = 64  # batches that are sorted by length together


class DirectionBatchSampler(Sampler[list[int]]):
    """Batches of one direction each, drawn with temperature, of similar length: a pure function of the seed.

    A direction with a share p of the data is drawn with probability proportional to p^(1/T) (paper, section 4.2).
    Inside a direction every sentence is used once before any is used again. One iteration covers the whole run, so
    resuming after n batches means skipping n.

    Args:
        directions: direction of each example, int [examples].
        lengths: length of each example in tokens, int [examples].
        batch_size: examples per batch.
        num_batches: batches in the whole run, of all processes.
        temperature: T; 1 follows the data, larger values move towards equal shares.
        seed: everything drawn depends on it.
    """

    def __init__(
        self,
        directions: np.ndarray,
        lengths: np.ndarray,
        batch_size: int,
        num_batches: int,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"The sampling temperature T must be above 0 (1 follows the data), got {temperature}.")
        # not named batch_size, or accelerate would give each process parts of batches instead of whole ones
        self._examples_per_batch = batch_size
        self._lengths = lengths
        # positions fit into 32 bits, which halves the memory: 8 bytes per example in all, these and the shuffled ones
        positions = np.arange(len(directions), dtype=np.int32 if len(directions) < 2**31 else np.int64)
        self._members = [positions[directions == d] for d in range(int(directions.max()) + 1)]
        self._num_batches = num_batches
        self._seed = seed
        shares = np.array([len(m) for m in self._members], dtype=np.float64) / len(directions)
        self.probabilities = shares ** (1 / temperature) / (shares ** (1 / temperature)).sum()

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        draw = np.random.default_rng([self._seed, 0])
        streams = [self._stream(direction) for direction in range(len(self._members))]
        for _ in range(self._num_batches):
            yield next(streams[draw.choice(len(streams), p=self.probabilities)])

    def _stream(self, direction: int) -> Iterator[list[int]]:
        """Yield batches of one direction without end: shuffle, sort by length inside large pools, shuffle batches."""
        size = self._examples_per_batch
        for epoch in _count():
            draw = np.random.default_rng([self._seed, 1, direction, epoch])
            order = draw.permutation(self._members[direction])
            for start in range(0, len(order), _POOL * size):
                pool = order[start : start + _POOL * size]
                pool[:] = pool[np.argsort(self._lengths[pool], kind="stable")]
            for i in draw.permutation(-(-len(order) // size)):
                yield order[i * size : (i + 1) * size].tolist()


def evaluation_batches(
    directions: np.ndarray, lengths: np.ndarray, batch_size: int, processes: int = 1
) -> list[list[int]]:
    """Return every example once, in batches of one direction each, of similar length.

    Args:
        directions: direction of each example, int [examples].
        lengths: length of each example in tokens, int [examples].
        batch_size: examples per batch, at most.
        processes: how many share the batches. As long as one can be split, their number becomes a multiple of it, so
            that no batch has to be counted twice for all processes to run as many.
    """
    batches = []
    for direction in np.unique(directions):
        members = np.flatnonzero(directions == direction)
        members = members[np.argsort(lengths[members], kind="stable")]
        batches += [members[start : start + batch_size].tolist() for start in range(0, len(members), batch_size)]
    while len(batches) % processes and len(largest := max(batches, key=len)) > 1:
        batches.remove(largest)
        batches += [largest[::2], largest[1::2]]
    return batches


def _count() -> Iterator[int]:
    epoch = 0
    while True:
        yield epoch
        epoch += 1


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Return rows of different lengths as one tensor, int64 [rows, longest], filled up with a value."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)


class TranslationCollator:
    """Pad encoded examples into a batch that always holds `decoder_input_ids`, whatever the model or loss needs.

    Args:
        tokenizer: for its padding token.
        model: the model to train, with or without adapters; it knows how to shift labels to the right.
        pair_ids: for models that route: id in the adapter of each direction of the encoded data, int64 [directions].
            The batch then holds `language_pairs`.
    """

    def __init__(self, tokenizer: Any, model: Any, pair_ids: torch.Tensor | None = None) -> None:
        self.pad_token_id = tokenizer.pad_token_id
        self.shift_right = label_shift(unwrap(model))
        self.pair_ids = pair_ids

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids = pad_rows([example["input_ids"] for example in examples], self.pad_token_id)
        labels = pad_rows([example["labels"] for example in examples], IGNORED)
        batch = {
            "input_ids": input_ids,
            # by length: in some tokenizers padding is also the end of sentences, or the unknown token
            "attention_mask": pad_rows([[1] * len(example["input_ids"]) for example in examples], 0),
            "labels": labels,
            "decoder_input_ids": self.shift_right(labels),
        }
        if self.pair_ids is not None:
            batch["language_pairs"] = self.pair_ids[[example["language_pair"] for example in examples]]
        return batch
