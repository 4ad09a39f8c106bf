"""Encoder states compared: of two models for the same text, and of translations inside one model, layer by layer.

Layer 0 is the output of the embedding, the last layer what the decoder reads. Beside every number on translations
stands the same number where sentences are compared with other sentences' translations: what is left then says how
alike languages are as a whole, not how alike translations are.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .similarity import StreamingCKA

ALL, SEEN, UNSEEN, MIXED = "all", "seen", "unseen", "seen and unseen"


def layer_similarity(batches: Iterable[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]) -> list[float]:
    """Return the debiased linear CKA of two encoders, layer i of one with layer i of the other.

    Args:
        batches: states of the same sentences or tokens, layer by layer, in both: each [n, d], any floating dtype.

    Raises:
        ValueError: if the two differ in their number of layers, or there are fewer than four inputs.
    """
    streamed, layers = None, 0
    for first, second in batches:
        if len(first) != len(second):
            raise ValueError(
                f"Expected encoders of as many layers, to compare them layer by layer; got {len(first) - 1} and "
                f"{len(second) - 1}."
            )
        if streamed is None:
            layers = len(first)
            streamed = StreamingCKA([(f"first {i}", f"second {i}") for i in range(layers)])
        named = {f"first {i}": states for i, states in enumerate(first)}
        streamed.update({**named, **{f"second {i}": states for i, states in enumerate(second)}})
    if streamed is None:
        raise ValueError("There are no states to compare.")
    found = streamed.similarity()
    return [found[f"first {i}", f"second {i}"] for i in range(layers)]


def source_similarity(source: Mapping[str, np.ndarray], states: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return one row per language and layer: the CKA of a model's sentences with those of its source.

    "cka_misaligned" is that with other sentences in the source.

    Args:
        source: language → mean-pooled states of the source model, float32 [layers, n, d].
        states: likewise of the model, of the same sentences.
    """
    rows = []
    for language, found in states.items():
        pair = tensors(source[language]), tensors(found)
        aligned, other = (layer_similarity([(pair[0], each)]) for each in (pair[1], list(map(misaligned, pair[1]))))
        rows += [
            {"language": language, "layer": layer, "cka": cka, "cka_misaligned": control}
            for layer, (cka, control) in enumerate(zip(aligned, other, strict=True))
        ]
    return rows


def language_similarity(states: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return one row per two languages and layer: how alike the states of translations are.

    "cka" is the debiased linear CKA; "retrieval" the share in percent of sentences whose translation is nearest, see
    `retrieval_accuracy`, and "cka_misaligned" and "retrieval_misaligned" the same with other sentences' translations.

    Args:
        states: language → mean-pooled states of translations in one order, float32 [layers, n, d].
    """
    rows = []
    for a, b in combinations(states, 2):
        for layer, (x, y) in enumerate(zip(tensors(states[a]), tensors(states[b]), strict=True)):
            other = misaligned(y)
            measured = {
                "cka": layer_similarity([([x], [y])])[0],
                "cka_misaligned": layer_similarity([([x], [other])])[0],
                "retrieval": retrieval_accuracy(x, y),
                "retrieval_misaligned": retrieval_accuracy(x, other),
            }
            rows.append({"languages": [a, b], "layer": layer, **measured})
    return rows


def retrieval_accuracy(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return in percent how often the nearest row by cosine is the translation, mean of both directions.

    Args:
        x: [n, d].
        y: [n, d]; row i is the translation of row i of x.
    """
    cosines = F.normalize(x.float(), dim=1) @ F.normalize(y.float(), dim=1).T
    own = torch.arange(len(x), device=x.device)
    found = [(cosines.argmax(dim) == own).float().mean().item() for dim in (0, 1)]
    return 100 * sum(found) / 2


def misaligned(states: torch.Tensor) -> torch.Tensor:
    """Return rows [n, d] in another order, each far from its place: neighbors may be of one text."""
    return states.roll(len(states) // 2, 0)


def tensors(states: np.ndarray) -> list[torch.Tensor]:
    """Return an array [layers, n, d], which may be a memory map, as one tensor per layer."""
    return [torch.from_numpy(np.array(layer)) for layer in states]


def groups_of(languages: Iterable[str], seen: Sequence[str]) -> list[str]:
    """Return the groups that a language, or a pair of languages, is reported in: all, and, where `seen` names those
    that the continued pre-training saw, seen, unseen, or one of each."""
    kinds = {code in seen for code in languages}
    return [ALL, MIXED if len(kinds) > 1 else SEEN if True in kinds else UNSEEN] if seen else [ALL]
