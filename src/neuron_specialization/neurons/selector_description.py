"""What a selector, as adapters record it, says of the adapter: in words, for cards and for people."""

import json
from collections.abc import Mapping
from typing import Any

RANDOM_WEIGHTS_SEED = "random_weights_seed"  # in a selector: of the model that activations were counted in
CONTROLS = {
    "RandomMatched": "as many neurons as other masks keep, drawn at random",
    "RandomOverlap": "the neurons of other masks, renumbered at random in each block",
    "WrongPair": "masks exchanged between languages",
    "Pooled": "one mask for many pairs, as large as the masks of single pairs",
}
_BASE_WAS_CHANGED = {
    "ffn_copies": "its base was widened for the training, by FFNs of their own for pairs or target languages, and\n"
    "that base is not kept. It is a ceiling to compare with.",
    "lass": "its base was put under masks of single weights (LaSS), which are not in these files. The block\n"
    "below, of which every pair keeps all, only tells pairs apart. It is a peer to compare with.",
    "bottleneck_adapters": "its base was given a bottleneck after every layer for the training, whose neurons\n"
    "are the blocks below. It is a peer to compare with.",
}
_RANDOM_WEIGHTS = "activations were counted in a model with random weights. It is a control to compare with."
_WHAT_TRAINS = {
    "full": "every parameter of the base, FFN neurons only for the pairs that keep them",
    "delta": "a dense change of the up projections, for each pair in the rows that it keeps",
    "low_rank": "a low-rank change of the up projections, for each pair in the rows that it keeps",
    "bottleneck_adapters": "the bottlenecks alone",
}


def describe_selector(selector: Mapping[str, Any] | None) -> str:
    """Return a selector with its settings, such as "CumulativeThreshold (k=0.95)"; "" where none was recorded."""
    settings = dict(selector or {})
    name = settings.pop("name", "")
    told = ", ".join(f"{key}={json.dumps(value)}" for key, value in settings.items() if value is not None)
    return f"{name} ({told})" if name and told else name


def what_trains(selector: Mapping[str, Any], trainable: str) -> str | None:
    """Return what an adapter trained; None for a `trainable` that is not known, or where nothing was trained."""
    return _WHAT_TRAINS.get(selector.get("name", ""), _WHAT_TRAINS.get(trainable))


def why_it_loads_nowhere(selector: Mapping[str, Any]) -> str | None:
    """Return why an adapter loads onto no checkpoint; None for one that does."""
    if RANDOM_WEIGHTS_SEED in selector:
        return _RANDOM_WEIGHTS
    return _BASE_WAS_CHANGED.get(selector.get("name", ""))
