"""Count, per language pair, at how many token positions each FFN neuron is active (Neuron Specialization, section 3).

`a_n` is the number of positions where the value that enters the down projection is above zero. In gated blocks the
sign of the activated gate is counted, since the product with the other branch is almost never exactly zero.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .base_model import device_of, moved, unwrap
from .ffn import STACKS, find_ffn_blocks, fingerprint, same_weights, sample_weights
from .language_pairs import check_pairs, check_source_tag, shorten
from .observation import is_distributed, observed, recording_bar, sum_over_processes
from .recorder import Recorder
from .tensor_file import load_described, save_described

ACTIVITY, ATTRIBUTION = "activity", "attribution"  # what was measured of each neuron


@dataclass(repr=False)
class ActivationCounts:
    """Activation counts of every FFN block, for several language pairs; or their attribution, for the same selectors.

    Attributes:
        language_pairs: names of the pairs; row `i` of every tensor belongs to `language_pairs[i]`.
        counts: block name → int64 [pairs, d_ff], number of positions at which each neuron was active; of attribution
            (see `record_attribution`), float64 sums over positions.
        tokens: stack → int64 [pairs], number of positions counted.
        stacks: block name → "encoder" or "decoder".
        fingerprint: what identifies the base model (see `neurons.ffn.fingerprint`).
        source_tag: what the tag on the source side names, "source" or "target".
        language_token_ids: language code → id of its token, where the recording knew them.
        base_model_name_or_path: where the model was loaded from, where it was.
        weights_sample: a few of the model's weights (see `neurons.ffn.sample_weights`).
        measure: what was measured, "activity" or "attribution".
    """

    language_pairs: list[str]
    counts: dict[str, torch.Tensor]
    tokens: dict[str, torch.Tensor]
    stacks: dict[str, str]
    fingerprint: dict[str, str | int] = field(default_factory=dict)
    source_tag: str = "source"
    language_token_ids: dict[str, int] | None = None
    base_model_name_or_path: str | None = None
    weights_sample: list[float] | None = None
    measure: str = ACTIVITY

    def __repr__(self) -> str:
        tokens = ", ".join(f"{int(count.sum()):,} {stack}" for stack, count in self.tokens.items())
        return f"ActivationCounts of {shorten(self.language_pairs)}: {len(self.counts)} blocks, {tokens} positions"

    @property
    def origin(self) -> dict[str, Any]:
        """What `NeuronMasks` selected from these counts keep of where they come from, as its keyword arguments."""
        ids = self.language_token_ids
        return {
            "stacks": dict(self.stacks),
            "fingerprint": dict(self.fingerprint),
            "language_token_ids": None if ids is None else dict(ids),
            "base_model_name_or_path": self.base_model_name_or_path,
            "weights_sample": self.weights_sample,
        }

    def __add__(self, other: "ActivationCounts") -> "ActivationCounts":
        """Add the counts of pairs that both hold, and append the pairs that only `other` holds.

        Raises:
            ValueError: if the two were recorded on different models.
        """
        self._check_same_model(other)
        pairs = [*self.language_pairs, *(p for p in other.language_pairs if p not in self.language_pairs)]

        def total(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            out = first.new_zeros(len(pairs), *first.shape[1:])
            out[: len(first)] = first
            return out.index_add_(0, torch.tensor([pairs.index(p) for p in other.language_pairs]), second)

        ids = {**(self.language_token_ids or {}), **(other.language_token_ids or {})}
        return replace(
            self,
            language_pairs=pairs,
            counts={name: total(self.counts[name], other.counts[name]) for name in self.counts},
            tokens={stack: total(self.tokens[stack], other.tokens[stack]) for stack in self.tokens},
            language_token_ids=ids or None,
            weights_sample=self.weights_sample or other.weights_sample,
        )

    def rates(self, block: str) -> torch.Tensor:
        """Return the share of positions at which each neuron of a block was active: float64 [pairs, d_ff]."""
        tokens = self.tokens[self.stacks[block]].clamp_min(1)
        return self.counts[block].double() / tokens.unsqueeze(1)

    def merge(self, *others: "ActivationCounts") -> "ActivationCounts":
        """Add the counts of several recordings, for example of the shards of one corpus."""
        return sum(others, self)

    def all_reduce(self) -> "ActivationCounts":
        """Sum over the processes of `torch.distributed`, which must all hold the same pairs; without it, a no-op."""
        counts = {name: sum_over_processes(tensor) for name, tensor in self.counts.items()}
        tokens = {stack: sum_over_processes(tensor) for stack, tensor in self.tokens.items()}
        return replace(self, counts=counts, tokens=tokens)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the counts to one safetensors file."""
        tensors = {f"counts.{name}": tensor for name, tensor in self.counts.items()}
        tensors |= {f"tokens.{stack}": tensor for stack, tensor in self.tokens.items()}
        about = {
            "language_pairs": self.language_pairs,
            "stacks": self.stacks,
            "fingerprint": self.fingerprint,
            "source_tag": self.source_tag,
            "language_token_ids": self.language_token_ids,
            "base_model_name_or_path": self.base_model_name_or_path,
            "weights_sample": self.weights_sample,
            "measure": self.measure,
        }
        save_described(path, tensors, "activation_counts", about)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "ActivationCounts":
        """Read counts written by `save`.

        Raises:
            ValueError: if the file holds something else.
        """
        expected = "activation counts; expected a file written by ActivationCounts.save"
        tensors, values = load_described(path, "activation_counts", expected)
        counts = {name: tensors[f"counts.{name}"] for name in values["stacks"]}  # in the order of the model
        tokens = {stack: tensors[f"tokens.{stack}"] for stack in STACKS}
        return cls(counts=counts, tokens=tokens, **values)

    def _check_same_model(self, other: "ActivationCounts") -> None:
        if self.measure != other.measure:
            raise ValueError(f"Expected two recordings of one measure, got {self.measure} and {other.measure}.")
        widths, others = ({n: t.shape[1] for n, t in counts.counts.items()} for counts in (self, other))
        if widths != others or self.fingerprint != other.fingerprint or self.source_tag != other.source_tag:
            raise ValueError(
                f"These counts come from different models: {self.fingerprint} with {len(widths)} blocks and "
                f"{other.fingerprint} with {len(others)} blocks. Record them on the same checkpoint."
            )
        if not same_weights(self.weights_sample, other.weights_sample):
            raise ValueError(
                "These counts come from two checkpoints of one architecture. Record them on the same one."
            )
        ids, other_ids = self.language_token_ids or {}, other.language_token_ids or {}
        if any(ids.get(code, token) != token for code, token in other_ids.items()):
            raise ValueError(f"These counts have different tokens for a language: {ids} and {other_ids}.")


def record_activations(
    model: nn.Module,
    batches: Mapping[str, Iterable[Mapping[str, Any]]],
    count_padding: bool = False,
    source_tag: str = "source",
    progress: bool | tqdm = True,
    language_token_ids: Mapping[str, int] | None = None,
) -> ActivationCounts:
    """Run `model` over each pair's batches with teacher forcing and count active neurons.

    The model runs in eval mode without its LM head, never compiled; counts stay on the device until the end and are
    exact in every dtype, under autocast as well.

    An encoder position counts where `attention_mask` is 1, a decoder position where its label is neither -100 nor
    padding; without labels, by `decoder_attention_mask`, else where `decoder_input_ids` is not padding. Labels that
    are the padding token, and padded sources without an `attention_mask`, give a warning. Where the padding token is
    the end-of-sentence token too, the first one after a sentence is its end and counts.

    Args:
        model: an encoder-decoder model; also one with adapters, which then runs under their masks: those of the
            `language_pairs` in a batch, or whatever the model would choose without. The key is not added here.
        batches: language pair → iterable of batches, each what the model's forward takes: `input_ids`,
            `attention_mask`, and `labels` or `decoder_input_ids`.
        count_padding: also count padding positions, as the code released with the paper does.
        source_tag: what the tag on the source side names, "source" or "target"; kept with the counts.
        progress: show a progress bar; or the bar to advance by batches.
        language_token_ids: language code → id of its token; kept with the counts, so that adapters made from them can
            read a sample's pair from its tokens.

    Raises:
        ValueError: if a pair's name is malformed, if there is no pair, if a pair has no batch, or if a batch has no
            decoder side or does not run through both stacks.
    """
    check_recordable(batches, source_tag)
    recorder = Recorder(unwrap(model), find_ffn_blocks(model), len(batches), count_padding)
    with recorder.attached(), observed(model) as run:
        for index, batch in each_batch(recorder.model, batches, progress):
            recorder.start_batch(index, batch)
            run(batch)
            recorder.check_batch()
    return recorded(recorder, batches, ACTIVITY, source_tag, language_token_ids)


def check_recordable(batches: Mapping[str, Any], source_tag: str) -> None:
    """Raise ValueError if a pair's name is malformed, if there is no pair, or if the source tag is unknown."""
    if not check_pairs(batches):
        raise ValueError("Expected at least one language pair to record, got an empty mapping.")
    check_source_tag(source_tag)


def each_batch(
    base: nn.Module, batches: Mapping[str, Iterable[Mapping[str, Any]]], progress: bool | tqdm
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield every batch on the device of `base`, after the index of its pair.

    Raises:
        ValueError: if a pair has no batch.
    """
    device = device_of(base)
    with recording_bar(batches.values(), progress) as bar:
        for index, pair in enumerate(batches):
            bar.set_postfix_str(pair, refresh=False)
            seen = 0
            for batch in batches[pair]:
                yield index, moved(batch, device)
                bar.update()
                seen += 1
            if not seen and not is_distributed():  # other processes may hold this pair's batches
                raise ValueError(f"{pair} has no batch to record. Every pair needs at least one sentence pair.")


def recorded(
    recorder: Recorder,
    language_pairs: Iterable[str],
    measure: str,
    source_tag: str,
    language_token_ids: Mapping[str, int] | None,
) -> ActivationCounts:
    """Return what a recorder summed up, after warning of padding that had to be told by its token.

    Raises:
        ValueError: if a sum is not finite.
    """
    recorder.warn_about_padding()
    pairs, counts = list(language_pairs), {name: tensor.cpu() for name, tensor in recorder.counts.items()}
    for name, tensor in counts.items():
        wrong = (~tensor.isfinite()).any(1)
        if wrong.any():
            raise ValueError(
                f"The {measure} of {name} is not finite for {pairs[int(wrong.nonzero()[0])]}: values overflowed. "
                "Record with a model in float32."
            )
    return ActivationCounts(
        pairs,
        counts,
        {stack: tensor.cpu() for stack, tensor in recorder.tokens.items()},
        {block.name: block.stack for block in recorder.blocks},
        fingerprint(recorder.model, recorder.blocks),
        source_tag,
        None if language_token_ids is None else dict(language_token_ids),
        getattr(recorder.model, "name_or_path", None) or None,
        sample_weights(recorder.blocks),
        measure,
    )
