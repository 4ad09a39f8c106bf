"""Denoising as in mBART (Liu et al. 2020, section 2.2): the model restores a sentence from a noised copy of it.

Spans of tokens are replaced by one mask token each, and the sentences of an example change places. The noise is drawn
anew each time an example is used, as a pure function of the seed, the example and the number of its batch: a resumed
run, or one with other processes and workers, draws the same. Validation noise never changes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

Objective = Literal["translation", "denoising"]
MASK_TOKEN = "<mask>"
_SENTENCE_ENDS = tuple(".!?…।॥؟۔")
_UNSPACED_ENDS = tuple("。！？")
_WORD_STARTS = ("▁", "Ġ")


class Noise:
    """Noise on token ids.

    Args:
        tokenizer: one with a mask token, and with the same tags and end of sentence on both sides (NLLB, mBART).
        mask_share: share of the tokens that spans cover; tags and the end of the sentence do not count.
        mean_span: mean λ ≥ 1 of the spans' lengths in tokens, which follow a Poisson distribution; a span of length 0
            inserts a mask.
        permute_sentences: whether the sentences of one example are shuffled.

    Raises:
        ValueError: if a value is out of range, or the tokenizer has no mask token.
    """

    def __init__(
        self, tokenizer: Any, mask_share: float = 0.35, mean_span: float = 3.5, permute_sentences: bool = True
    ) -> None:
        if not 0 < mask_share < 1 or mean_span < 1:
            raise ValueError(
                f"Expected a mask_share between 0 and 1, and a mean_span of at least 1; got {mask_share} and "
                f"{mean_span}."
            )
        if tokenizer.mask_token in (None, tokenizer.unk_token):
            raise ValueError(
                f"Denoising needs a mask token, and this {type(tokenizer).__name__} has none. Start from a checkpoint "
                "that has one (mBART, NLLB), or train a new model with --objective denoising."
            )
        self.settings = {"mask_share": mask_share, "mean_span": mean_span, "permute_sentences": permute_sentences}
        self.mask = tokenizer.mask_token_id
        self._special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id, self.mask}
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self._ends = np.array([token.endswith(_SENTENCE_ENDS) for token in tokens])
        self._unspaced_ends = np.array([token.endswith(_UNSPACED_ENDS) for token in tokens])
        self._starts = np.array([token.startswith(_WORD_STARTS) for token in tokens])

    def __call__(self, tokens: Sequence[int], draw: np.random.Generator) -> list[int]:
        """Return a noised copy, never longer; the special tokens at either end stay in place."""
        text = [i for i, token in enumerate(tokens) if token not in self._special]
        if not text:
            return list(tokens)
        start, stop = text[0], text[-1] + 1
        body = np.asarray(tokens[start:stop])
        if self.settings["permute_sentences"]:
            body = self._permuted(body, draw)
        return [*tokens[:start], *self._infilled(body, draw), *tokens[stop:]]

    def _permuted(self, body: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        ends = self._unspaced_ends[body[:-1]] | (self._ends[body[:-1]] & self._starts[body[1:]])
        sentences = np.split(body, np.flatnonzero(ends) + 1)
        return np.concatenate([sentences[i] for i in draw.permutation(len(sentences))])

    def _infilled(self, body: np.ndarray, draw: np.random.Generator) -> list[int]:
        covered = round(self.settings["mask_share"] * len(body))
        spans = self._spans(covered, draw)
        # what remains, one entry per kept token (-1) and per span (its length), in random order
        layout = np.full(len(body) - covered + len(spans), -1)
        layout[draw.choice(len(layout), len(spans), replace=False)] = spans
        found, position = [], 0
        for length in layout.tolist():
            found.append(int(body[position]) if length < 0 else self.mask)
            position += 1 if length < 0 else length
        return found

    def _spans(self, covered: int, draw: np.random.Generator) -> list[int]:
        """Return lengths of spans that cover exactly so many tokens, and are no more than these."""
        spans: list[int] = []
        while (left := covered - sum(spans)) > 0:
            spans.append(min(int(draw.poisson(self.settings["mean_span"])), left))
        while len(spans) > covered:  # or the sentence could outgrow the model's positions
            spans.remove(0)
        return spans


class NoisyExamples(TorchDataset):
    """Encoded examples whose input is their target with noise; the target stays as it is.

    Args:
        examples: what `encode_parallel` returns. Its inputs are not used: of "en-de", German is denoised.
        noise: the noise.
        seed: everything drawn depends on it.
    """

    def __init__(self, examples: Dataset, noise: Noise, seed: int) -> None:
        self.examples, self.noise, self.seed = examples, noise, seed

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """Return examples by index, or by index and number of the batch that they are drawn for."""
        visits = [(int(key), 0) if np.isscalar(key) else (int(key[0]), int(key[1])) for key in keys]  # type: ignore
        examples = self.examples.__getitems__([index for index, _ in visits])
        for example, visit in zip(examples, visits, strict=True):
            example["input_ids"] = self.noise(example["labels"], np.random.default_rng([self.seed, *visit]))
        return examples


class NumberedBatches(Sampler[list[tuple[int, int]]]):
    """The batches of a sampler, each index with the number of its batch, from 1."""

    def __init__(self, batches: Sampler[list[int]]) -> None:
        self._batches: Any = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number, batch in enumerate(self._batches, 1):
            yield [(index, number) for index in batch]


@dataclass
class ObjectiveArguments:
    """What the model learns: to translate, or to restore noised sentences."""

    objective: Objective = field(
        default="translation",
        metadata={
            "help": "translation, or denoising of the target side: of de-de for monolingual German, of en-de too."
        },
    )
    mask_share: float = field(default=0.35, metadata={"help": "Share of the tokens that masks cover (denoising)."})
    mean_span: float = field(default=3.5, metadata={"help": "Mean tokens per mask, Poisson distributed (denoising)."})
    permute_sentences: bool = field(
        default=True, metadata={"help": "Shuffle the sentences inside each example (denoising)."}
    )

    def check(self, language_pairs: Sequence[str], source_tag: str) -> None:
        """Refuse pairs and tags that the objective cannot train on.

        Raises:
            ValueError: if sentences are to be translated into their own language, or tags of the target are to be
                restored.
        """
        copies = [pair for pair in language_pairs if len(set(pair.split("-"))) == 1]
        if self.objective == "translation" and copies:
            raise ValueError(
                f"{', '.join(copies)}: source and target are the same sentence. Set --objective denoising, or "
                "--language_pairs of two languages."
            )
        if self.objective == "denoising" and source_tag != "source":
            raise ValueError("Denoising takes its input from the target side, so source_tag must be 'source'.")

    def noise(self, tokenizer: Any) -> Noise | None:
        """Return the noise, or None for translation."""
        if self.objective == "translation":
            return None
        return Noise(tokenizer, self.mask_share, self.mean_span, self.permute_sentences)
