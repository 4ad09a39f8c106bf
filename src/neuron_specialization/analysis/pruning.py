"""Choose FFN neurons to prune, by what they did on validation text, and mask them for every language pair.

Each criterion scores neurons; the highest scores are pruned first. Pruned neurons output 0 (`mask_bias=True` in
the adapter's config), so that a compact export leaves them out and computes the same.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from ..neurons.activations import ActivationCounts
from ..neurons.language_pairs import DEFAULT_PAIR, Routes
from ..neurons.masks import NeuronMasks
from ..neurons.selection import language_probabilities
from .mass_activation import MassActivation

CRITERIA = (
    "dead",
    "most_activated",
    "least_activated",
    "most_positive",
    "most_negative",
    "specialized",
    "general",
    "shortest",
    "longest",
    "random",
)
BY_LANGUAGE = ("specialized", "general")  # criteria that compare the languages of a stack
BY_TOKEN = ("shortest", "longest")  # criteria that need credit by token
NO_MASS = {"positive mass": 0.0, "negative mass": 0.0}  # `mass_shares` where nothing is pruned
Scores = dict[str, torch.Tensor]


def pruning_scores(mass: MassActivation, criterion: str, seed: int = 0) -> Scores:
    """Score neurons by a recording of their mass, summed over its sets of text. Sums count per position of the stack,
    so that encoder and decoder compare.

    - "dead": neurons that are never the arg-max of their layer, those active at the fewest positions first. Only these
      can be pruned, however high the rate.
    - "most_activated", "least_activated": by the number of positions with a value above zero.
    - "most_positive", "most_negative": by positive and negative mass. After a ReLU nothing is negative.
    - "specialized", "general": by low and high entropy of the activation rates over languages (LAPE's measure), those
      of the source in the encoder and of the target in the decoder, also where the source carries the target's tag.
      Neurons that were never active are pruned last; those of a stack with a single language never, with a warning.
    - "shortest", "longest": by the number of distinct tokens that a neuron is credited with (TX-Ray's length), another
      measure of specialized and general. Only neurons that are alive can be pruned.
    - "random": a seeded draw.

    Args:
        mass: recorded on validation text at site "neurons" or "pre_activation"; for "specialized" and "general", a set
            for each language pair, by its name.
        criterion: one of CRITERIA.
        seed: of "random"; ties are broken by the lower index elsewhere.

    Returns:
        block → float64 [d_ff]; -inf for neurons that the criterion never prunes.

    Raises:
        ValueError: if the criterion is unknown, the recording is of the residual stream, holds a single language on
            each side (for "specialized" and "general") or no credit by token (for "shortest" and "longest"), or if
            there is nothing negative to sort by.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}.")
    if mass.site == "residual":
        raise ValueError("Neurons of FFN blocks are pruned; this recording is of the residual stream.")
    if criterion == "most_negative" and not any(bool(values.any()) for values in mass.negative.values()):
        raise ValueError("Nothing is negative at this site of the model (after a ReLU, say); record pre_activation.")
    if criterion in BY_LANGUAGE:
        return _score_entropy(mass, criterion)
    generator = torch.Generator().manual_seed(seed)
    return {layer: _score(mass, criterion, layer, generator) for layer in mass.credit}


def _score(mass: MassActivation, criterion: str, layer: str, generator: torch.Generator) -> torch.Tensor:
    positions = mass.positions[mass.stacks[layer]].sum().clamp_min(1)
    active = mass.active[layer].sum(0).double() / positions
    if criterion == "dead":
        return torch.where(mass.wins[layer].sum(0) > 0, -torch.inf, -active)
    if criterion in ("most_activated", "least_activated"):
        return active if criterion == "most_activated" else -active
    if criterion in ("most_positive", "most_negative"):
        return (mass.positive if criterion == "most_positive" else mass.negative)[layer].sum(0) / positions
    if criterion in BY_TOKEN:
        return _score_length(mass, layer, 1 if criterion == "longest" else -1)
    return torch.rand(len(active), generator=generator, dtype=torch.float64)


def _score_entropy(mass: MassActivation, criterion: str) -> Scores:
    counts = ActivationCounts(mass.names, mass.active, mass.positions, mass.stacks)
    scores, alone = {}, {}
    for layer, stack in mass.stacks.items():
        languages, rates = language_probabilities(counts, stack, [layer])
        if len(languages) == 1:
            alone[stack] = languages[0]
            scores[layer] = torch.full_like(rates[0], -torch.inf)
            continue
        shares = rates / rates.sum(0).clamp_min(torch.finfo(torch.float64).tiny)
        entropy = torch.special.entr(shares).sum(0)
        score = entropy if criterion == "general" else -entropy
        scores[layer] = torch.where(rates.sum(0) > 0, score, score.min() - 1)
    if alone.keys() >= set(mass.stacks.values()):
        raise ValueError(f"{criterion!r} compares languages of one side; the recording holds {', '.join(mass.names)}.")
    for stack, language in alone.items():
        warnings.warn(
            f"The {stack} has a single language, {language}: {criterion!r} prunes none of its neurons.", stacklevel=3
        )
    return scores


def _score_length(mass: MassActivation, layer: str, sign: int) -> torch.Tensor:
    if not mass.token_ids:
        raise ValueError("The length of neurons needs credit by token: pass token_ids to record_mass.")
    length = (mass.token_credit[layer][:, :, :-1].sum(0) > 0).sum(1).double()
    return torch.where(mass.wins[layer].sum(0) > 0, sign * length, -torch.inf)


def prune(
    scores: Scores,
    rate: float,
    origin: Mapping[str, Any],
    scope: Literal["layer", "global"] = "layer",
) -> NeuronMasks:
    """Return masks of a single pair, "default", without the neurons that score highest.

    Args:
        scores: block → float64 [d_ff].
        rate: share of neurons to prune, in [0, 1); rounded down. Fewer are pruned where fewer have a score.
        origin: of the recording (`MassActivation.origin`).
        scope: take the share from each block, or from all of them together (one neuron per block stays).

    Raises:
        ValueError: if the rate is not in [0, 1), or the scope is unknown.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"The pruning rate must be a share in [0, 1), got {rate!r}.")
    if scope not in ("layer", "global"):
        raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}.")
    if scope == "layer":
        pruned = {name: _highest(score, int(rate * len(score) + 1e-9)) for name, score in scores.items()}
    else:
        together = torch.cat([_keep_one(score) for score in scores.values()])
        chosen = _highest(together, int(rate * len(together) + 1e-9))
        parts = chosen.split([len(score) for score in scores.values()])
        pruned = dict(zip(scores, parts, strict=True))
    rows = {name: ~chosen.unsqueeze(0) for name, chosen in pruned.items()}
    selector = {"name": "prune", "rate": rate, "scope": scope}
    origin = {**origin, "stacks": {name: origin["stacks"][name] for name in rows}}
    return NeuronMasks(rows=rows, routes=Routes.per_pair([DEFAULT_PAIR]), selector=selector, **origin)


def for_pairs(masks: NeuronMasks, language_pairs: Iterable[str]) -> NeuronMasks:
    """Return the masks of a single pair, such as pruned ones, for every one of some pairs: all share its row."""
    routes = Routes([DEFAULT_PAIR], [DEFAULT_PAIR], {pair: (0, 0) for pair in language_pairs})
    return replace(masks, routes=routes)


def mass_shares(masks: NeuronMasks, mass: MassActivation) -> dict[str, float]:
    """Return which share of all positive and of all negative mass the neurons have that masks of a single pair prune.

    Args:
        masks: such as `prune` returns.
        mass: the recording that they were chosen by; the sums are over its layers and sets of text.
    """
    shares = {}
    for sign, of in (("positive mass", mass.positive), ("negative mass", mass.negative)):
        pruned = sum(of[name].sum(0)[~kept[0]].sum().item() for name, kept in masks.rows.items())
        shares[sign] = pruned / max(sum(of[name].sum().item() for name in masks.rows), 1e-300)
    return shares


def mass_matched(masks: NeuronMasks, mass: MassActivation, seed: int = 0) -> NeuronMasks:
    """Return masks that prune random neurons with as much positive mass, in each block, as those pruned in `masks`.

    A control: does it matter which neurons are pruned, or only how much mass? All neurons of a block are put in a
    random order, and as many of the first ones are pruned as come nearest to the mass. How many these are follows from
    that: more than in `masks` of "most_positive", fewer than in those of "dead". `mass_shares` says what was reached.

    Args:
        masks: what `prune` returned.
        mass: the recording it was chosen by.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = {}
    for name, kept in masks.rows.items():
        total = mass.positive[name].sum(0)
        order = torch.randperm(len(total), generator=generator)
        together = torch.cat([total.new_zeros(1), total[order].cumsum(0)[:-1]])  # of none, of one, ...; one stays
        count = int((together - total[~kept[0]].sum()).abs().argmin())
        rows[name] = torch.ones_like(kept)
        rows[name][0, order[:count]] = False
    selector = {"name": "mass_matched", "seed": seed, "like": masks.selector}
    return replace(masks, rows=rows, selector=selector)


def _highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return which entries have the `count` highest scores, bool [n]; fewer where fewer have a score."""
    order = scores.argsort(descending=True, stable=True)[:count]
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[order] = True
    return chosen & scores.isfinite()


def _keep_one(score: torch.Tensor) -> torch.Tensor:
    """Return the scores without the lowest one, so that no block loses all of its neurons."""
    return score.clone().index_fill_(0, score.argmin(keepdim=True), -torch.inf)
