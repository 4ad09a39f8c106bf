"""Mass activation (TX-Ray, UAI 2020; arXiv 2412.13881): how strongly, and for which tokens, units are active.

A unit is a neuron of an FFN block or a dimension of the residual stream. Over all positions t that are not padding,
with h_n(t) the value of unit n:

- positive mass  Σ_t max(h_n(t), 0), and negative mass  Σ_t max(-h_n(t), 0), apart;
- credit         Σ_t h_n(t) over the positions where n is the arg-max of its layer (TX-Ray's mass): a position with no
  value above zero is credited to no unit. A unit is alive if it is the arg-max at least once;
- token credit   the credit by token, from which a unit's length (the number of distinct tokens with credit) and its
  token distribution are read: p(w | n) = credit of n by w / credit of n, which sums to 1 over the tokens w that were
  tracked and, as one entry, all others; 0 everywhere for a dead unit;
- tag credit     the credit by a tag of each source token, such as its part of speech.

The code released with TX-Ray (`Evaluation_metrics/measures.py` of copenlu/tx-ray) differs from these definitions: it
credits the arg-max even where its value is not above zero. And it gives a token the mean, over the token's
occurrences, of the unit's value divided by the unit's total, so that the values of a unit do not sum to 1 where a
token occurs twice; ours are sums over occurrences, a distribution. For distances see `mass_comparison.MassChange`.

All are sums, so batches, recordings and processes add up; memory does not grow with the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import torch

from ..neurons.ffn import same_weights
from ..neurons.language_pairs import shorten
from ..neurons.observation import sum_over_processes
from ..neurons.tensor_file import load_described, save_described

_ABOUT = ("names", "site", "stacks", "token_ids", "tags", "vocabulary")
SUMS = ("positive", "negative", "active", "credit", "wins", "token_credit", "tag_credit")
_ORIGIN = ("fingerprint", "base_model_name_or_path", "weights_sample")


@dataclass(repr=False)
class MassActivation:
    """Mass of every unit, for several named sets of text.

    Attributes:
        names: the sets; row `i` of every tensor belongs to `names[i]`.
        site: what was recorded, one of SITES in `sites`.
        stacks: layer → "encoder" or "decoder". A layer is named by its FFN block, or by its module.
        positive: layer → float64 [names, units], positive mass.
        negative: layer → float64 [names, units], negative mass, as positive numbers.
        active: layer → int64 [names, units], positions with a value above zero; at site "neurons" of gated FFNs, with
            the activated gate above zero, as `ActivationCounts` counts.
        credit: layer → float64 [names, units].
        wins: layer → int64 [names, units], positions at which the unit is the arg-max.
        positions: stack → int64 [names], positions recorded.
        token_ids: tokens whose credit was kept, in ascending order; empty if none was.
        token_credit: layer → float64 [names, units, len(token_ids) + 1]; the last column is that of all other tokens.
        tags: names of tags; empty if none were given.
        tag_credit: encoder layer → float64 [names, units, tags].
        fingerprint: what identifies the model (see `neurons.ffn.fingerprint`).
        base_model_name_or_path: where the model was loaded from, where it was.
        weights_sample: a few of the model's weights (see `neurons.ffn.sample_weights`).
        vocabulary: what identifies the tokenizer, such as a digest; empty if nothing was said of it.
    """

    names: list[str]
    site: str
    stacks: dict[str, str]
    positive: dict[str, torch.Tensor]
    negative: dict[str, torch.Tensor]
    active: dict[str, torch.Tensor]
    credit: dict[str, torch.Tensor]
    wins: dict[str, torch.Tensor]
    positions: dict[str, torch.Tensor]
    token_ids: list[int] = field(default_factory=list)
    token_credit: dict[str, torch.Tensor] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    tag_credit: dict[str, torch.Tensor] = field(default_factory=dict)
    fingerprint: dict[str, str | int] = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    weights_sample: list[float] | None = None
    vocabulary: str = ""

    def __repr__(self) -> str:
        return f"MassActivation of {shorten(self.names)}: {len(self.stacks)} layers, site {self.site!r}"

    @property
    def origin(self) -> dict[str, Any]:
        """What masks chosen by this recording keep of where it comes from, as keyword arguments of `NeuronMasks`."""
        return {"stacks": dict(self.stacks), **{what: getattr(self, what) for what in _ORIGIN}}

    def alive(self, name: str, layer: str) -> torch.Tensor:
        """Return which units are the arg-max somewhere: bool [units]. The others are dead."""
        return self.wins[layer][self.names.index(name)] > 0

    def token_distribution(self, name: str, layer: str) -> torch.Tensor:
        """Return each unit's share of credit by token: float64 [units, token_ids + 1], rows sum to 1, or 0 if dead."""
        self._need(self.token_ids, "token_ids")
        credit = self.token_credit[layer][self.names.index(name)]
        return credit / credit.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)

    def length(self, name: str, layer: str) -> torch.Tensor:
        """Return the number of distinct tokens that each unit is credited with: int64 [units].

        Tokens outside `token_ids` do not count.
        """
        self._need(self.token_ids, "token_ids")
        return (self.token_credit[layer][self.names.index(name), :, :-1] > 0).sum(1)

    def top_tokens(self, name: str, layer: str, unit: int, count: int = 10) -> list[tuple[int, float]]:
        """Return the tokens with most credit of one unit, and their shares, largest first; ties by lower id."""
        shares = self.token_distribution(name, layer)[unit, :-1]
        order = shares.argsort(descending=True, stable=True)[:count]
        return [(self.token_ids[int(i)], shares[i].item()) for i in order if shares[i] > 0]

    def __add__(self, other: "MassActivation") -> "MassActivation":
        """Add up two recordings of the same sets on the same checkpoint.

        Raises:
            ValueError: if checkpoint, site, sets, layers, tokens or tags differ.
        """
        self.check_comparable(other)
        if not same_weights(self.weights_sample, other.weights_sample):
            raise ValueError(
                "These recordings come from two checkpoints of one architecture. Record them on the same one."
            )
        if self.names != other.names:
            raise ValueError(f"These recordings hold other sets of text: {self.names} and {other.names}.")
        sums: dict[str, Any] = {
            what: {key: tensor + getattr(other, what)[key] for key, tensor in getattr(self, what).items()}
            for what in (*SUMS, "positions")
        }
        return replace(self, **sums)

    def all_reduce(self) -> "MassActivation":
        """Sum over the processes of `torch.distributed`, which must all hold the same sets."""
        sums: dict[str, Any] = {
            what: {key: sum_over_processes(tensor) for key, tensor in getattr(self, what).items()}
            for what in (*SUMS, "positions")
        }
        return replace(self, **sums)

    def check_comparable(self, other: "MassActivation") -> None:
        """Raise ValueError unless `other` records the same site, layers, tokens and tags of such a model."""
        for what in ("site", "fingerprint", "vocabulary", "token_ids", "tags"):
            first, second = getattr(self, what), getattr(other, what)
            if first != second:
                raise ValueError(f"These recordings differ in {what}: {first!r:.200} and {second!r:.200}.")
        if list(self.credit) != list(other.credit):
            raise ValueError(f"These recordings hold other layers: {list(self.credit)} and {list(other.credit)}.")

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything to one safetensors file: the sums as tensors, the rest as JSON in its header."""
        tensors = {
            f"{what}.{key}": tensor for what in (*SUMS, "positions") for key, tensor in getattr(self, what).items()
        }
        about = {what: getattr(self, what) for what in (*_ABOUT, *_ORIGIN)}
        save_described(path, tensors, "mass_activation", about)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "MassActivation":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        expected = "mass activation; expected what MassActivation.save writes"
        tensors, values = load_described(path, "mass_activation", expected)
        sums: dict[str, Any] = {what: {} for what in (*SUMS, "positions")}
        for key, tensor in tensors.items():
            what, _, name = key.partition(".")
            sums[what][name] = tensor
        for what in SUMS:  # layers in the order of the model: the file has them sorted by name
            sums[what] = {layer: sums[what][layer] for layer in values["stacks"] if layer in sums[what]}
        return cls(**values, **sums)

    def _need(self, recorded: Sequence[Any], argument: str) -> None:
        if not recorded:
            raise ValueError(f"This was not recorded: pass {argument}=... to record_mass.")
