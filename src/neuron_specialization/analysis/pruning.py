"""Choose FFN neurons to prune, by what they did on validation text, and mask them for every language pair.

Each criterion scores neurons; the highest scores are pruned first. Pruned neurons output 0 (`mask_bias=True` in
the adapter's config), so that a compact export leaves them out and computes the same.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from ..neurons.language_pairs import DEFAULT_PAIR, Routes
from ..neurons.masks import NeuronMasks
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
BY_TOKEN = ("shortest", "longest")  # criteria that need credit by token
NO_MASS = {"positive mass": 0.0, "negative mass": 0.0}  # `mass_shares` where nothing is pruned
Scores = dict[str, torch.Tensor]


def pruning_scores(mass: MassActivation, criterion: str, seed: int = 0) -> Scores:
    """Score neurons by a recording of their mass, summed over its sets of text.

    - "dead": neurons that are never the arg-max of their layer, those active at the fewest positions first. Only these
      can be pruned, however high the rate.
    - "most_activated", "least_activated": by the number of positions with a value above zero.
    - "most_positive", "most_negative": by positive and negative mass. After a ReLU nothing is negative.
    - "specialized", "general": by low and high entropy of the activation rates over the sets (LAPE's measure);
      neurons that were never active are pruned last.
    - "shortest", "longest": by the number of distinct tokens that a neuron is credited with (TX-Ray's length), another
      measure of specialized and general. Only neurons that are alive can be pruned.
    - "random": a seeded draw.

    Args:
        mass: recorded on validation text at site "neurons" or "pre_activation".
        criterion: one of CRITERIA.
        seed: of "random"; ties are broken by the lower index elsewhere.

    Returns:
        block → float64 [d_ff]; -inf for neurons that the criterion never prunes.

    Raises:
        ValueError: if the criterion is unknown, the recording is of the residual stream, holds a single set (for
            "specialized" and "general") or no credit by token (for "shortest" and "longest"), or if there is nothing
            negative to sort by.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}.")
    if mass.site == "residual":
        raise ValueError("Neurons of FFN blocks are pruned; this recording is of the residual stream.")
    if criterion in ("specialized", "general") and len(mass.names) < 2:
        raise ValueError(f"{criterion!r} compares sets of text, such as languages; the recording holds {mass.names}.")
    if criterion == "most_negative" and not any(bool(values.any()) for values in mass.negative.values()):
        raise ValueError("Nothing is negative at this site of the model (after a ReLU, say); record pre_activation.")
    generator = torch.Generator().manual_seed(seed)
    return {layer: _score(mass, criterion, layer, generator) for layer in mass.credit}


def _score(mass: MassActivation, criterion: str, layer: str, generator: torch.Generator) -> torch.Tensor:
    active = mass.active[layer].sum(0).double()
    if criterion == "dead":
        return torch.where(mass.wins[layer].sum(0) > 0, -torch.inf, -active)
    if criterion in ("most_activated", "least_activated"):
        return active if criterion == "most_activated" else -active
    if criterion in ("most_positive", "most_negative"):
        return (mass.positive if criterion == "most_positive" else mass.negative)[layer].sum(0)
    if criterion in BY_TOKEN:
        return _score_length(mass, layer, 1 if criterion == "longest" else -1)
    if criterion == "random":
        return torch.rand(len(active), generator=generator, dtype=torch.float64)
    rates = mass.active[layer].double() / mass.positions[mass.stacks[layer]].clamp_min(1).unsqueeze(1)
    shares = rates / rates.sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    entropy = torch.special.entr(shares).sum(0)
    score = entropy if criterion == "general" else -entropy
    return torch.where(active > 0, score, score.min() - 1)


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


def mass_matched(masks: NeuronMasks, mass: MassActivation, seed: int = 0, nearest: int = 10) -> NeuronMasks:
    """Return masks that prune, for each neuron pruned in `masks`, a random other one of about the same positive mass.

    A control: does it matter which neurons are pruned, or only how much mass? It answers where neurons of such mass
    are left: at low rates and for criteria that do not go by it ("dead", "specialized", "general", "shortest",
    "most_negative", "random"). "most_positive" has no match: whatever is heavier is pruned too, so that every
    substitute is lighter. Those of "most_activated" and "longest" are lighter as well, and those of "least_activated"
    heavier, because activity goes with mass. `mass_shares` says what was reached.

    Args:
        masks: what `prune` returned.
        mass: the recording it was chosen by.
        seed: of the draw.
        nearest: each substitute is drawn from this many unpruned neurons of the block that are closest in mass. Where
            none is left, the neuron itself is pruned.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = {}
    for name, kept in masks.rows.items():
        total = mass.positive[name].sum(0)
        free = kept[0].clone()
        substitutes = torch.zeros_like(free)
        for neuron in (~kept[0]).nonzero().flatten().tolist():
            candidates = free.nonzero().flatten()
            if len(candidates):
                near = candidates[(total[candidates] - total[neuron]).abs().argsort(stable=True)[:nearest]]
                neuron = int(near[torch.randint(len(near), (1,), generator=generator)])
                free[neuron] = False
            substitutes[neuron] = True
        rows[name] = ~substitutes.unsqueeze(0)
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
