"""Record mass activation (see `mass_activation`) while a model runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..neurons.activations import each_batch
from ..neurons.base_model import unwrap
from ..neurons.ffn import DECODER, ENCODER, STACKS, find_ffn_blocks, fingerprint, is_time_major, sample_weights
from ..neurons.observation import observed
from ..neurons.positions import IGNORED, fit_positions, source_positions, target_positions
from .mass_activation import SUMS, MassActivation
from .sites import Place, attached, find_places

MOST_CELLS = 1 << 27  # of token credit: 1 GB of float64


def record_mass(
    model: nn.Module,
    batches: Mapping[str, Iterable[Mapping[str, Any]]],
    site: str = "neurons",
    *,
    layers: Sequence[int] | None = None,
    stack: str | None = None,
    token_ids: Iterable[int] = (),
    tags: Sequence[str] = (),
    vocabulary: str = "",
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
        vocabulary: what identifies the tokenizer, such as a digest, so that recordings of two are not compared.
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
    with attached(places, recorder.add, recorder.add_active), observed(model) as run:
        for row, batch in each_batch(base, batches, progress):
            recorder.start_batch(row, batch)
            run({key: value for key, value in batch.items() if key != "token_tags"})
    return recorder.result(site, vocabulary)


def trackable_tokens(
    model: nn.Module, batches: Mapping[str, Iterable[Mapping[str, Any]]], vocabulary: int, site: str = "neurons"
) -> list[int]:
    """Return the tokens that `record_mass` has room for: the whole vocabulary, or else the most frequent of the text.

    Args:
        model: as `record_mass` takes it.
        batches: likewise; they are read once where the vocabulary does not fit.
        vocabulary: number of entries.
        site: likewise.

    Returns:
        Ids in ascending order; of equally frequent ones the lower come first.
    """
    base: Any = unwrap(model)
    room = MOST_CELLS // (len(batches) * sum(place.units for place in find_places(base, site))) - 1
    if room >= vocabulary:
        return list(range(vocabulary))
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    for batch in (batch for several in batches.values() for batch in several):
        tokens, positions = _tokens(batch, base.config)
        for stack in STACKS:
            counts += torch.bincount(tokens[stack][positions[stack]].cpu(), minlength=vocabulary)
    most = counts.argsort(descending=True, stable=True)[: max(0, room)]
    return sorted(most[counts[most] > 0].tolist())


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
        """Look up where the coming batch counts, and the token of each position: [batch, length] per stack."""
        self.row = row
        tokens, self.positions = _tokens(batch, self.model.config)
        for stack in STACKS:
            self.total[stack][row] += int(self.positions[stack].sum())
        if self.tracked:
            known = torch.tensor(self.tracked, device=tokens[ENCODER].device)
            self.columns = {stack: _columns(known, ids) for stack, ids in tokens.items()}
        if self.tags:
            if "token_tags" not in batch:
                raise ValueError('tags were named, but a batch has no "token_tags", int64 of the shape of input_ids.')
            self.batch_tags = batch["token_tags"]

    def add(self, place: Place, values: torch.Tensor) -> None:
        """Add what one layer computed for the batch: [batch, length, units]."""
        values, counted = self._counted(place, values)
        rows = values[counted].double()  # [positions, units]
        sums = {what: tensor[self.row] for what, tensor in self.sums[place.name].items()}
        sums["positive"] += rows.clamp_min(0).sum(0)
        sums["negative"] += (-rows).clamp_min(0).sum(0)
        if place.gated is None:
            sums["active"] += (rows > 0).sum(0)
        best, unit = rows.max(1)
        on = best > 0
        best, unit = best[on], unit[on]
        sums["credit"].index_add_(0, unit, best)
        sums["wins"] += torch.bincount(unit, minlength=place.units)
        for what, columns in (("token_credit", self.columns.get(place.stack)), ("tag_credit", self.batch_tags)):
            if what in sums and columns is not None:
                column = fit_positions(columns, values, place.stack)[counted][on]
                named = column != IGNORED
                sums[what].index_put_((unit[named], column[named]), best[named], accumulate=True)

    def add_active(self, place: Place, gate: torch.Tensor) -> None:
        """Add where the neurons of a gated block are active, by its activated gate: [batch, length, units]."""
        gate, counted = self._counted(place, gate)
        self.sums[place.name]["active"][self.row] += (gate[counted] > 0).sum(0)

    def _counted(self, place: Place, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return values as [batch, length, units], and the positions of theirs that count: bool [batch, length]."""
        if values.ndim != 3:
            raise ValueError(
                f"{place.name} sees {list(values.shape)} instead of [batch, length, width]: tokens of an expert, "
                "which cannot be told apart. Record another site or layer."
            )
        values = values.transpose(0, 1) if self.time_major else values
        return values, fit_positions(self.positions[place.stack], values, place.stack).bool()

    def result(self, site: str, vocabulary: str) -> MassActivation:
        """Return the sums, on the CPU."""
        blocks = find_ffn_blocks(self.model)
        sums: dict[str, Any] = {what: {} for what in SUMS}
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
            fingerprint=fingerprint(self.model, blocks),
            base_model_name_or_path=getattr(self.model, "name_or_path", None) or None,
            weights_sample=sample_weights(blocks),
            vocabulary=vocabulary,
        )


def _tokens(batch: Mapping[str, Any], config: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return what token each position stands for, and whether it counts: stack → int64, bool [batch, length]."""
    source, _ = source_positions(batch, config)
    target, _ = target_positions(batch, config)
    tokens = {ENCODER: batch["input_ids"], DECODER: batch.get("labels", batch.get("decoder_input_ids"))}
    source = torch.ones_like(tokens[ENCODER]) if source is None else source
    return tokens, {ENCODER: source.bool(), DECODER: target.bool()}


def _columns(known: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return each token's position among the known ones, in ascending order; for others, their number."""
    place = torch.searchsorted(known, ids.contiguous()).clamp_max(len(known) - 1)
    return torch.where(known[place] == ids, place, len(known))
