"""Noise on source sentences, to measure how robust a model is: of characters, and of words that a gradient chooses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F

from ..adapter.routing import pair_argument
from ..neurons.base_model import device_of, moved, unwrap
from .batching import TranslationCollator
from .tokenization import encode, resolve_tokens


@dataclass
class NoiseArguments:
    """Noise on the source side of the test set; rates are shares of characters or words, in [0, 1)."""

    swap: float = field(default=0.02, metadata={"help": "Rate of letters that change places with the next one."})
    drop: float = field(default=0.02, metadata={"help": "Rate of letters that are left out."})
    repeat: float = field(default=0.02, metadata={"help": "Rate of letters that are doubled."})
    case: float = field(default=0.02, metadata={"help": "Rate of letters that change between upper and lower case."})
    substitute: float = field(default=0.1, metadata={"help": "Rate of words that a gradient replaces."})
    noise_seed: int = field(default=0, metadata={"help": "Seed of the noise."})

    def __post_init__(self) -> None:
        for rate in fields(self):
            value = getattr(self, rate.name)
            if rate.name != "noise_seed" and not 0 <= value < 1:
                raise ValueError(f"{rate.name} is a share in [0, 1), got {value!r}.")


def noisy_characters(sentences: Sequence[str], noise: NoiseArguments) -> list[str]:
    """Return sentences with letters swapped, dropped, doubled and of the other case, each at its rate.

    What happens to a sentence depends on the seed, its place in the list and itself only. Digits, punctuation and
    spaces stay, and letters change places within a word only.
    """
    draws = (np.random.default_rng([noise.noise_seed, i]) for i in range(len(sentences)))
    return [_noisy(sentence, noise, draw) for sentence, draw in zip(sentences, draws, strict=True)]


def _noisy(sentence: str, noise: NoiseArguments, draw: np.random.Generator) -> str:
    # every letter draws the same number of times, so that one rate does not change what another one does
    draws = draw.random((len(sentence), 4))
    letters = list(sentence)
    for i in range(len(letters) - 1):
        if draws[i, 0] < noise.swap and letters[i].isalpha() and letters[i + 1].isalpha():
            letters[i], letters[i + 1] = letters[i + 1], letters[i]
    result = []
    for letter, (_, drop, repeat, case) in zip(letters, draws, strict=True):
        if letter.isalpha():
            letter = letter.swapcase() if case < noise.case else letter
            letter = "" if drop < noise.drop else letter * 2 if repeat < noise.repeat else letter
        result.append(letter)
    return "".join(result) or sentence


def drop_words(sentences: Sequence[str], rate: float) -> list[str]:
    """Return sentences without a share of their words, drawn at random; at least one word stays.

    Raises:
        ValueError: if the rate is not in [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"The rate of dropped words is a share in [0, 1), got {rate!r}.")
    kept = []
    for i, words in enumerate(map(str.split, sentences)):
        draws = np.random.default_rng([0, i]).random(len(words))
        least = min(rate, draws.max(initial=0))
        kept.append(" ".join(word for word, drawn in zip(words, draws, strict=True) if drawn >= least))
    return kept


@dataclass(frozen=True)
class _Word:
    """A word of a sentence that is a single token."""

    place: int  # among the words
    position: int  # among the tokens
    token: int


def substitute_words(
    model: Any,
    tokenizer: Any,
    rows: Dataset,
    pair: str,
    rate: float,
    *,
    language_tokens: Mapping[str, str] | None = None,
    source_tag: str = "source",
    batch_size: int = 64,
    neighbors: int = 10,
) -> list[str]:
    """Replace the words whose replacement raises the loss most, to first order (HotFlip; Ebrahimi et al., 2018).

    Words that are single tokens are replaced by others of these sentences that are single tokens too, each by one of
    its nearest in the model's own embedding space (cosine). Of all replacements, the estimate of the loss gained is
    (E[new] - E[old]) · dL/dE[old], with L the cross-entropy of the reference. A sentence loses the best `rate` of its
    words, rounded to the nearest number but at least one, and only while the estimate is positive.

    Args:
        model: a seq2seq model that takes `inputs_embeds`, with adapters (then under the masks of `pair`) or without.
        tokenizer: its tokenizer.
        rows: columns "source" and "target".
        pair: the direction.
        rate: share of a sentence's words to replace; 0 replaces none.
        language_tokens: language code → language token, where codes are not tokens themselves.
        source_tag: what the tag on the source side names.
        batch_size: sentence pairs per batch.
        neighbors: candidates for each word.

    Returns:
        The sentences, as many as there are rows.
    """
    sentences = list(rows["source"])
    if not rate:
        return sentences
    tokens = resolve_tokens(tokenizer, [pair], language_tokens, source_tag)
    encoded = encode(tokenizer, pair, sentences, rows["target"], tokens, source_tag)
    words = _single_token_words(tokenizer, sentences, encoded["input_ids"])
    text = {word.token: sentences[i].split()[word.place] for i, found in enumerate(words) for word in found}
    embedding = unwrap(model).get_encoder().get_input_embeddings()
    nearest = _nearest(embedding, sorted(text), neighbors)
    collate, device = TranslationCollator(tokenizer, model), device_of(model)
    route = pair_argument(model, pair)
    training = model.training
    model.eval()
    result = []
    try:
        for start in range(0, len(sentences), batch_size):
            several = range(start, min(start + batch_size, len(sentences)))
            batch = collate([{name: encoded[name][i] for name in ("input_ids", "labels")} for i in several])
            gradients, vectors = _gradients(model, embedding, moved(batch, device), route)
            for row, i in enumerate(several):
                count = max(1, round(rate * len(sentences[i].split())))
                chosen = _best(words[i], gradients[row], vectors[row], embedding, nearest)[:count]
                split = sentences[i].split()
                for place, token in chosen:
                    split[place] = text[token]
                result.append(" ".join(split))
    finally:
        model.train(training)
    return result


def _single_token_words(tokenizer: Any, sentences: Sequence[str], ids: Sequence[list[int]]) -> list[list[_Word]]:
    """Return each sentence's words that are one token and only letters, where the tokens of its words make it up."""
    cut = {word for sentence in sentences for word in sentence.split()}
    options = {"add_special_tokens": False, "return_attention_mask": False}
    of = {word: tokenizer(word, **options)["input_ids"] for word in sorted(cut)}
    found = []
    for sentence, row in zip(sentences, ids, strict=True):
        parts = [of[word] for word in sentence.split()]
        flat = [token for part in parts for token in part]
        # the tags and the end of sentence stand around the words
        first = next((s for s in range(len(row) - len(flat) + 1) if row[s : s + len(flat)] == flat), None)
        starts = np.cumsum([0, *map(len, parts)])[:-1]
        found.append(
            [
                _Word(place, first + int(start), part[0])
                for place, (word, part, start) in enumerate(zip(sentence.split(), parts, starts, strict=True))
                if first is not None and len(part) == 1 and word.isalpha()
            ]
        )
    return found


def _nearest(embedding: Any, tokens: list[int], count: int) -> dict[int, torch.Tensor]:
    """Return token → the tokens next to it, int64 [count or fewer]."""
    ids = torch.tensor(tokens, dtype=torch.long, device=embedding.weight.device)
    with torch.no_grad():
        vectors = F.normalize(embedding(ids), dim=-1)
        near = (vectors @ vectors.T).fill_diagonal_(-torch.inf).topk(min(count, max(0, len(tokens) - 1))).indices
    return {token: ids[near[i]] for i, token in enumerate(tokens)}


def _gradients(model: Any, embedding: Any, batch: dict[str, torch.Tensor], route: dict) -> tuple[Any, Any]:
    """Return the gradient of the reference's cross-entropy by the source embeddings, and these: [batch, length, d]."""
    vectors = embedding(batch.pop("input_ids")).detach().requires_grad_()
    labels = batch.pop("labels")
    with torch.enable_grad():
        logits = model(inputs_embeds=vectors, **batch, **route).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        (gradient,) = torch.autograd.grad(loss, vectors)
    return gradient, vectors.detach()


def _best(
    words: list[_Word], gradient: torch.Tensor, vectors: torch.Tensor, embedding: Any, nearest: dict[int, torch.Tensor]
) -> list[tuple[int, int]]:
    """Return (place, new token) of each word's best replacement that raises the loss, the best first."""
    ranked = []
    for word in words:
        candidates = nearest[word.token]
        if not len(candidates):
            continue
        with torch.no_grad():
            gains = (embedding(candidates) - vectors[word.position]) @ gradient[word.position]
        best = int(gains.argmax())
        if gains[best] > 0:
            ranked.append((gains[best].item(), word.place, int(candidates[best])))
    return [(place, token) for _, place, token in sorted(ranked, reverse=True)]
