"""For which words do the neurons specialized for a pair fire? Activity by tag: part of speech, or sentence length.

Every position may carry a tag. c_n(t) is the number of positions with tag t at which neuron n is active. Of the
neurons that pair p keeps in a block, those are *specific* that no comparable pair keeps, and those *shared* that all
of them keep. With a pivot the encoder is looked at for directions into it, the decoder for those out of it (see
`comparable_pairs`). A set S of neurons has the profile

    A_S(t) = Σ_{n in S} c_n(t) / Σ_t' Σ_{n in S} c_n(t'),

the share of its activations by tag. Reported are the ratio A_specific(t) / A_shared(t) and the total variation
½ Σ_t |A_specific(t) - A_shared(t)|: 0 where both fire on the same words.

Two random sets of neurons differ as well, the more the rarer they fire. So the total variation is compared with that
of the same neurons with the two names dealt out anew, within groups of equal activity (fifths of all specific and
shared neurons by Σ_t c_n(t)).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..neurons.activations import each_batch
from ..neurons.base_model import unwrap
from ..neurons.ffn import DECODER, ENCODER, STACKS, FfnBlock, find_ffn_blocks, is_time_major
from ..neurons.masks import NeuronMasks
from ..neurons.observation import observed
from ..neurons.positions import fit_positions
from ..neurons.recorder import watch_neurons
from .agreement import comparable_pairs
from .overlap import holm

_LEVELS = 5  # of activity, within which names are dealt out
_FEWEST = 5  # neurons in either set


@dataclass
class TaggedCounts:
    """Activation counts of every FFN block by tag, for several language pairs.

    Attributes:
        language_pairs: the pairs.
        tags: names of the tags.
        counts: block name → int64 [pairs, tags, d_ff], positions with the tag at which each neuron was active.
        positions: stack → int64 [pairs, tags], positions with the tag.
    """

    language_pairs: list[str]
    tags: list[str]
    counts: dict[str, torch.Tensor]
    positions: dict[str, torch.Tensor]


def record_tagged(
    model: nn.Module, batches: Mapping[str, Iterable[Mapping[str, Any]]], tags: Sequence[str]
) -> TaggedCounts:
    """Run `model` over each pair's batches with teacher forcing and count active neurons by tag.

    Args:
        model: an encoder-decoder model.
        batches: pair → batches as `record_activations` takes them, with "source_tags" and "target_tags" beside:
            int64 of the shapes of `input_ids` and `labels`, positions in `tags`, negative where there is no tag.
            A decoder position has the tag of the token it predicts.
        tags: names of the tags.

    Raises:
        ValueError: if a tag has no name, or a layer does not see whole sentences (experts).
    """
    base = unwrap(model)
    blocks = find_ffn_blocks(base)
    counts = {block.name: torch.zeros(len(batches), len(tags), block.d_ff, dtype=torch.int64) for block in blocks}
    positions = {stack: torch.zeros(len(batches), len(tags), dtype=torch.int64) for stack in STACKS}
    time_major = is_time_major(base)
    places: dict[str, torch.Tensor] = {}  # of the batch that runs: [batch, length], 0 for no tag
    row = 0

    def see(block: FfnBlock, values: torch.Tensor) -> None:
        if values.ndim != 3:
            raise ValueError(f"{block.name} sees tokens of an expert, {list(values.shape)}, whose tags are not known.")
        values = values.transpose(0, 1) if time_major else values
        fitted = fit_positions(places[block.stack], values, block.stack)
        tagged = F.one_hot(fitted.flatten(), len(tags) + 1)[:, 1:].float()  # exact up to 2^24 positions per batch
        counts[block.name][row] += (tagged.T @ (values > 0).float().flatten(0, 1)).long().cpu()

    handles = [watch_neurons(block, partial(see, block)) for block in blocks]
    try:
        with observed(model) as run:
            for row, batch in each_batch(base, batches, progress=False):
                given = (batch.pop("source_tags"), batch.pop("target_tags"))
                places |= {s: (tags_of + 1).clamp_min(0) for s, tags_of in zip(STACKS, given, strict=True)}
                for stack, found in places.items():
                    if found.max() > len(tags):
                        raise ValueError(f"Expected tags from 0 to {len(tags) - 1}, got {int(found.max()) - 1}.")
                    positions[stack][row] += torch.bincount(found.flatten(), minlength=len(tags) + 1)[1:].cpu()
                run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return TaggedCounts(list(batches), list(tags), counts, positions)


def check_blocks(model: nn.Module, masks: NeuronMasks) -> None:
    """Raise ValueError if masks are not over the blocks of a model, before anything is recorded for them."""
    blocks = {block.name: block.d_ff for block in find_ffn_blocks(model)}
    if blocks != masks.d_ff:
        raise ValueError(
            f"The masks are of another model: they have {len(masks.d_ff)} blocks such as "
            f"{next(iter(masks.d_ff.items()))}, this model {len(blocks)} such as {next(iter(blocks.items()))}."
        )


def tag_rows(counts: TaggedCounts, masks: NeuronMasks, draws: int = 999) -> list[dict[str, Any]]:
    """Return one row per block and pair: how far specific neurons fire on other words than shared ones.

    Args:
        counts: of pairs that the masks have.
        masks: which neurons each pair keeps.
        draws: times that the names "specific" and "shared" are dealt out anew.

    Returns:
        Rows with "stack", "layer", "block", "pair", the numbers of "specific" and "shared" neurons, and, where either
        set has five or more, "difference" (total variation), "chance" (its mean over draws), "p" (corrected by Holm
        over all rows) and "ratios" (tag → A_specific / A_shared; None where the shared never fire).
    """
    draw = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for stack in (ENCODER, DECODER):
        among = comparable_pairs(counts.language_pairs, stack)
        blocks = [name for name in counts.counts if masks.stacks[name] == stack]
        for layer, block in enumerate(blocks):
            for pair, others in among.items():
                kept = masks.row(pair, block).numpy()
                rivals = np.stack([masks.row(other, block).numpy() for other in others])
                sets = kept & ~rivals.any(0), kept & rivals.all(0)
                active = counts.counts[block][counts.language_pairs.index(pair)].double().numpy()
                row = {"stack": stack, "layer": layer, "block": block, "pair": pair}
                rows.append(row | _compare(active, *sets, counts.tags, draws, draw))
    tested = [row for row in rows if row.get("p") is not None]
    for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p"] = p
    return rows


def mean_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per block from those of `tag_rows`.

    Numbers of neurons are means over all pairs, differences over the pairs that have enough neurons to be tested;
    "pairs that differ" says how many of those do (p < 0.05).
    """
    averaged: list[dict[str, Any]] = []
    for block in dict.fromkeys(row["block"] for row in rows):
        every = [row for row in rows if row["block"] == block]
        tested = [row for row in every if row["p"] is not None]
        averaged.append(
            {
                **{key: every[0][key] for key in ("stack", "layer", "block")},
                **{name: float(np.mean([row[name] for row in every])) for name in ("specific", "shared")},
                **{
                    name: float(np.mean([row[name] for row in tested])) if tested else None
                    for name in ("difference", "chance")
                },
                "pairs that differ": f"{sum(row['p'] < 0.05 for row in tested)} of {len(tested)}",
            }
        )
    return averaged


def _compare(
    active: np.ndarray,
    specific: np.ndarray,
    shared: np.ndarray,
    tags: list[str],
    draws: int,
    draw: np.random.Generator,
) -> dict[str, Any]:
    """Compare two sets of neurons, bool [d_ff], by their active positions, float64 [tags, d_ff]."""
    sizes = {"specific": int(specific.sum()), "shared": int(shared.sum())}
    if min(sizes.values()) < _FEWEST:
        return {**sizes, "difference": None, "chance": None, "p": None, "ratios": {}}
    either = specific | shared
    values, named = active[:, either], specific[either]
    order = values.sum(0).argsort(kind="stable")
    levels = np.array_split(order, _LEVELS)
    profiles = _profile(values[:, named]), _profile(values[:, ~named])
    difference = np.abs(profiles[0] - profiles[1]).sum() / 2
    by_chance = np.empty(draws)
    for i in range(draws):
        dealt = np.empty_like(named)
        for level in levels:
            dealt[level] = draw.permutation(named[level])
        by_chance[i] = np.abs(_profile(values[:, dealt]) - _profile(values[:, ~dealt])).sum() / 2
    p = (1 + (by_chance >= difference - 1e-12).sum()) / (1 + draws)
    ratios = {tag: float(a / b) if b else None for tag, a, b in zip(tags, *profiles, strict=True)}
    return {
        **sizes, "difference": float(difference), "chance": float(by_chance.mean()), "p": float(p), "ratios": ratios,
    }  # fmt: skip


def _profile(active: np.ndarray) -> np.ndarray:
    """Return the share of activations by tag, float64 [tags], of counts [tags, neurons]."""
    totals = active.sum(1)
    return totals / max(totals.sum(), 1)
