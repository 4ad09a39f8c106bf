"""Mass activation (TX-Ray, UAI 2020; arXiv 2412.13881): how strongly, and for which tokens, units are active.

A unit is a neuron of an FFN block or a dimension of the residual stream. Over all positions t that are not padding,
with h_n(t) the value of unit n:

- positive mass  Σ_t max(h_n(t), 0), and negative mass  Σ_t max(-h_n(t), 0), apart;
- credit         Σ_t h_n(t) over the positions where n is the arg-max of its layer (TX-Ray's mass): a position with no
  value above zero is credited to no unit. A unit is alive if it is the arg-max at least once;
- token credit   the credit by token, from which a unit's token distribution and its length (the number of distinct
  tokens) are read;
- tag credit     the credit by a tag of each source token, such as its part of speech.

All are sums, so batches, recordings and processes add up; memory does not grow with the text.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from ..neurons.base_model import unwrap
from ..neurons.ffn import DECODER, ENCODER, STACKS, find_ffn_blocks, fingerprint, is_time_major
from ..neurons.observation import observed, sum_over_processes
from ..neurons.positions import fit_positions, source_positions, target_positions
from .sites import Place, attached, find_places

IGNORED_TAG = -100
MOST_CELLS = 1 << 27  # of token credit: 1 GB of float64
_SUMS = ("positive", "negative", "active", "credit", "wins", "token_credit", "tag_credit")


@dataclass
class MassActivation:
    """Mass of every unit, for several named sets of text.

    Attributes:
        names: the sets; row `i` of every tensor belongs to `names[i]`.
        site: what was recorded, one of `sites.SITES`.
        stacks: layer → "encoder" or "decoder". A layer is named by its FFN block, or by its module.
        positive: layer → float64 [names, units], positive mass.
        negative: layer → float64 [names, units], negative mass, as positive numbers.
        active: layer → int64 [names, units], positions with a value above zero.
        credit: layer → float64 [names, units].
        wins: layer → int64 [names, units], positions at which the unit is the arg-max.
        positions: stack → int64 [names], positions recorded.
        token_ids: tokens whose credit was kept, in ascending order; empty if none was.
        token_credit: layer → float64 [names, units, len(token_ids) + 1]; the last column is that of all other tokens.
        tags: names of tags; empty if none were given.
        tag_credit: encoder layer → float64 [names, units, tags].
        fingerprint: what identifies the model (see `neurons.ffn.fingerprint`).
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

    def tag_shares(self, name: str, layer: str) -> torch.Tensor:
        """Return each unit's share of credit by tag: float64 [units, tags], 0 for units without credit."""
        self._need(self.tags, "tags")
        credit = self.tag_credit[layer][self.names.index(name)]
        return credit / credit.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)

    def __add__(self, other: "MassActivation") -> "MassActivation":
        """Add up two recordings of the same sets on the same model.

        Raises:
            ValueError: if model, site, sets, layers, tokens or tags differ.
        """
        self.check_comparable(other)
        if self.names != other.names:
            raise ValueError(f"These recordings hold other sets of text: {self.names} and {other.names}.")
        sums: dict[str, Any] = {
            what: {key: tensor + getattr(other, what)[key] for key, tensor in getattr(self, what).items()}
            for what in (*_SUMS, "positions")
        }
        return replace(self, **sums)

    def all_reduce(self) -> "MassActivation":
        """Sum over the processes of `torch.distributed`, which must all hold the same sets."""
        sums: dict[str, Any] = {
            what: {key: sum_over_processes(tensor) for key, tensor in getattr(self, what).items()}
            for what in (*_SUMS, "positions")
        }
        return replace(self, **sums)

    def check_comparable(self, other: "MassActivation") -> None:
        """Raise ValueError unless `other` is a recording of the same site, layers, tokens and tags of such a model."""
        for what in ("site", "fingerprint", "token_ids", "tags"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                raise ValueError(f"These recordings differ in {what}: {mine!r:.200} and {theirs!r:.200}.")
        if list(self.credit) != list(other.credit):
            raise ValueError(f"These recordings hold other layers: {list(self.credit)} and {list(other.credit)}.")

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything to one safetensors file."""
        tensors = {
            f"{what}.{key}": tensor.contiguous()
            for what in (*_SUMS, "positions")
            for key, tensor in getattr(self, what).items()
        }
        about = {what: getattr(self, what) for what in ("names", "site", "stacks", "token_ids", "tags", "fingerprint")}
        save_file(tensors, path, metadata={"mass_activation": json.dumps(about)})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "MassActivation":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get("mass_activation")
            if about is None:
                raise ValueError(f"{path} holds no mass activation; expected what MassActivation.save writes.")
            sums: dict[str, Any] = {what: {} for what in (*_SUMS, "positions")}
            for key in file.keys():
                what, _, name = key.partition(".")
                sums[what][name] = file.get_tensor(key)
        return cls(**json.loads(about), **sums)

    def _need(self, recorded: Sequence[Any], argument: str) -> None:
        if not recorded:
            raise ValueError(f"This was not recorded: pass {argument}=... to record_mass.")


def record_mass(
    model: nn.Module,
    batches: Mapping[str, Iterable[Mapping[str, Any]]],
    site: str = "neurons",
    *,
    layers: Sequence[int] | None = None,
    stack: str | None = None,
    token_ids: Iterable[int] = (),
    tags: Sequence[str] = (),
    progress: bool = True,
) -> MassActivation:
    """Run `model` over each set's batches with teacher forcing and add up the mass of its units.

    Args:
        model: an encoder-decoder model; also one with adapters, which then runs under their masks.
        batches: name → iterable of batches as `record_activations` takes them, such as the batches of one direction.
            With `tags`, a batch also holds "token_tags", int64 like `input_ids`: positions in `tags`, -100 for none.
        site: "pre_activation" (what enters the activation function of an FFN), "neurons" (what its down projection
            reads) or "residual" (what a Transformer layer returns).
        layers: which layers of a stack, counted from 0; all of them by default.
        stack: "encoder" or "decoder" only.
        token_ids: tokens to keep credit by. An encoder position stands for its input token, a decoder position for the
            token it predicts, or reads where there are no labels.
        tags: names of the tags in "token_tags"; credit by tag is kept for the encoder.
        progress: show a progress bar.

    Returns:
        The sums of this process; see `MassActivation.all_reduce`.

    Raises:
        ValueError: if the site, a layer or the stack is unknown, if a set has no batch, if credit by token would take
            more than 1 GB, or if a layer does not see whole sentences (experts).
    """
    base = unwrap(model)
    places = find_places(base, site, layers, stack)
    tracked = sorted(set(token_ids))
    cells = len(batches) * sum(place.units for place in places) * (len(tracked) + 1 if tracked else 0)
    if cells > MOST_CELLS:
        raise ValueError(
            f"Credit by token for {len(batches)} sets, {len(places)} layers and {len(tracked)} tokens needs {cells:,} "
            f"numbers, more than the {MOST_CELLS:,} allowed. Name fewer token_ids, layers, or sets at a time."
        )
    recorder = _Recorder(base, places, list(batches), tracked, list(tags))
    device = next(base.parameters()).device
    with attached(places, recorder.add), observed(model) as run:
        for row, name in enumerate(batches):
            seen = 0
            for batch in tqdm(batches[name], desc=f"recording {name}", disable=not progress, leave=False):
                moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                recorder.start_batch(row, moved)
                run({key: value for key, value in moved.items() if key != "token_tags"})
                seen += 1
            if not seen:
                raise ValueError(f"{name} has no batch to record.")
    return recorder.result(site, fingerprint(base, find_ffn_blocks(base)))


class _Recorder:
    """Adds each layer's sums up, on its device."""

    def __init__(self, model: Any, places: list[Place], names: list[str], tracked: list[int], tags: list[str]) -> None:
        self.model, self.places, self.names, self.tracked, self.tags = model, places, names, tracked, tags
        self.time_major = is_time_major(model)
        self.sums = {place.name: self._zeros(place) for place in places}
        self.total = {stack: torch.zeros(len(names), dtype=torch.int64) for stack in STACKS}
        # of the batch that runs
        self.row = 0
        self.positions: dict[str, torch.Tensor] = {}
        self.columns: dict[str, torch.Tensor] = {}
        self.batch_tags: torch.Tensor | None = None

    def _zeros(self, place: Place) -> dict[str, torch.Tensor]:
        def zeros(*more: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            return torch.zeros(len(self.names), place.units, *more, dtype=dtype, device=place.device)

        sums = {what: zeros() for what in ("positive", "negative", "credit")}
        sums |= {what: zeros(dtype=torch.int64) for what in ("active", "wins")}
        if self.tracked:
            sums["token_credit"] = zeros(len(self.tracked) + 1)
        if self.tags and place.stack == ENCODER:
            sums["tag_credit"] = zeros(len(self.tags))
        return sums

    def start_batch(self, row: int, batch: Mapping[str, Any]) -> None:
        """Find out where the coming batch counts, and what its positions stand for: [batch, length] per stack."""
        self.row = row
        source, _ = source_positions(batch, self.model.config)
        target, _ = target_positions(batch, self.model.config)
        tokens = {ENCODER: batch["input_ids"], DECODER: batch.get("labels", batch.get("decoder_input_ids"))}
        source = torch.ones_like(tokens[ENCODER]) if source is None else source
        self.positions = {ENCODER: source.bool(), DECODER: target.bool()}
        for stack in STACKS:
            self.total[stack][row] += int(self.positions[stack].sum())
        if self.tracked:
            known = torch.tensor(self.tracked, device=source.device)
            self.columns = {stack: _columns(known, ids) for stack, ids in tokens.items()}
        if self.tags:
            if "token_tags" not in batch:
                raise ValueError('tags were named, but a batch has no "token_tags", int64 of the shape of input_ids.')
            self.batch_tags = batch["token_tags"]

    def add(self, place: Place, values: torch.Tensor) -> None:
        """Add what one layer computed for the batch: [batch, length, units]."""
        if values.ndim != 3:
            raise ValueError(
                f"{place.name} sees {list(values.shape)} instead of [batch, length, width]: tokens of an expert, "
                "which cannot be told apart. Record another site or layer."
            )
        values = values.transpose(0, 1) if self.time_major else values
        counted = fit_positions(self.positions[place.stack], values, place.stack).bool()
        rows = values[counted].double()  # [positions, units]
        sums = {what: tensor[self.row] for what, tensor in self.sums[place.name].items()}
        sums["positive"] += rows.clamp_min(0).sum(0)
        sums["negative"] += (-rows).clamp_min(0).sum(0)
        sums["active"] += (rows > 0).sum(0)
        best, unit = rows.max(1)
        on = best > 0
        best, unit = best[on], unit[on]
        sums["credit"].index_add_(0, unit, best)
        sums["wins"] += torch.bincount(unit, minlength=place.units)
        for what, columns in (("token_credit", self.columns.get(place.stack)), ("tag_credit", self.batch_tags)):
            if what in sums and columns is not None:
                column = fit_positions(columns, values, place.stack)[counted][on]
                named = column != IGNORED_TAG
                sums[what].index_put_((unit[named], column[named]), best[named], accumulate=True)

    def result(self, site: str, fingerprint: dict[str, str | int]) -> MassActivation:
        """Return the sums, on the CPU."""
        sums: dict[str, Any] = {what: {} for what in _SUMS}
        for layer, tensors in self.sums.items():
            for what, tensor in tensors.items():
                sums[what][layer] = tensor.cpu()
        stacks = {place.name: place.stack for place in self.places}
        return MassActivation(
            names=self.names,
            site=site,
            stacks=stacks,
            **sums,
            positions=self.total,
            token_ids=self.tracked,
            tags=self.tags,
            fingerprint=fingerprint,
        )


def _columns(known: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return each token's place among the known ones, in ascending order, or their number: for others."""
    place = torch.searchsorted(known, ids.contiguous()).clamp_max(len(known) - 1)
    return torch.where(known[place] == ids, place, len(known))
