"""Masks over FFN neurons: one boolean row per stack for each language pair, or for each language."""

import json
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from . import adapter_file
from .card import describe_adapter, keep_card_of_hub, names_no_base, write_card
from .card_sections import CardFacts
from .combination import combined, joined
from .ffn import ENCODER, STACKS, in_order
from .files import CARD_NAME, WRITTEN, atomic_directory
from .language_pairs import Routes, shorten, split_pair

ORIGIN = ("language_token_ids", "base_model_name_or_path", "weights_sample")


@dataclass(repr=False)
class NeuronMasks:
    """Which neurons each language pair keeps.

    Attributes:
        rows: block name → bool [rows, d_ff], True where the neuron is kept. Blocks of one stack have as many rows.
        stacks: block name → "encoder" or "decoder".
        routes: which row each pair uses in each stack.
        selector: how the neurons were selected, as recorded in the file.
        fingerprint: what identifies the base model (see `neurons.ffn.fingerprint`).
        language_token_ids: language code → id of its token, from which adapters of these masks read a sample's pair.
        base_model_name_or_path: where the base model was loaded from.
        weights_sample: a few weights of the base model (see `neurons.ffn.sample_weights`).
    """

    rows: dict[str, torch.Tensor]
    stacks: dict[str, str]
    routes: Routes
    selector: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, str | int] = field(default_factory=dict)
    language_token_ids: dict[str, int] | None = None
    base_model_name_or_path: str | None = None
    weights_sample: list[float] | None = None

    def __repr__(self) -> str:
        kept = {name: rows.double().mean().item() for name, rows in self.rows.items()}
        lines = [
            f"  {name:<40} {self.stacks[name]:<8} {self.rows[name].shape[1]:>7} {kept[name]:>7.1%}" for name in kept
        ]
        if len(lines) > 12:
            lines = [*lines[:6], f"  ... ({len(lines) - 12} more)", *lines[-6:]]
        head = f"  {'block':<40} {'stack':<8} {'neurons':>7} {'kept':>7}"
        return "\n".join([f"NeuronMasks of {shorten(self.language_pairs)}", head, *lines])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NeuronMasks):
            return NotImplemented
        same = self.metadata() == other.metadata()
        return same and all(rows.equal(other.rows[name]) for name, rows in self.rows.items())

    def __post_init__(self) -> None:
        for name, rows in self.rows.items():
            expected = len(self.routes.row_names(self.stacks[name]))
            if rows.dtype != torch.bool or rows.ndim != 2 or len(rows) != expected:
                raise ValueError(
                    f"{name}: expected bool [{expected}, d_ff] mask rows, got {rows.dtype} {list(rows.shape)}."
                )

    @property
    def language_pairs(self) -> list[str]:
        """The pairs with rows of their own or implied by factorized rows; a pair's id is its position here."""
        return self.routes.language_pairs

    @property
    def d_ff(self) -> dict[str, int]:
        """Block name → number of neurons."""
        return {name: rows.shape[1] for name, rows in self.rows.items()}

    def row(self, pair: str, block: str) -> torch.Tensor:
        """Return the mask of one block for one pair: bool [d_ff]. Zero-shot pairs are composed.

        Raises:
            ValueError: if the pair or the block is unknown.
        """
        if block not in self.rows:
            raise ValueError(f"There is no block {block!r} in these masks. Known blocks: {', '.join(self.rows)}.")
        encoder_row, decoder_row = self.routes.route(pair)
        return self.rows[block][encoder_row if self.stacks[block] == ENCODER else decoder_row]

    def sparsity(self, pair: str) -> dict[str, float]:
        """Return block name → share of its neurons that are masked (not kept) for `pair`."""
        return {name: 1 - self.row(pair, name).double().mean().item() for name in self.rows}

    def iou(self, pair_a: str, pair_b: str) -> dict[str, float]:
        """Return block name → intersection over union of the two pairs' kept neurons (paper, section 5.3)."""
        return {name: intersection_over_union(self.row(pair_a, name), self.row(pair_b, name)) for name in self.rows}

    def iou_matrix(self, block: str, pairs: Sequence[str]) -> torch.Tensor:
        """Return the IoU of every two pairs' kept neurons in one block: float64 [pairs, pairs]."""
        rows = torch.stack([self.row(pair, block) for pair in pairs]).double()
        shared, sizes = rows @ rows.T, rows.sum(1)
        return shared / (sizes[:, None] + sizes - shared)

    def mean_overlap(self, stack: str) -> dict[str, dict[str, float]]:
        """Return pair → pair → IoU of the neurons they keep, mean over the blocks of one stack.

        Raises:
            ValueError: if the masks have no block in that stack.
        """
        pairs = self.language_pairs
        blocks = [name for name, of in self.stacks.items() if of == stack]
        if not blocks:
            raise ValueError(f"Expected a stack of {sorted(set(self.stacks.values()))}, got {stack!r}.")
        mean = torch.stack([self.iou_matrix(block, pairs) for block in blocks]).mean(0)
        return {pair: dict(zip(pairs, row, strict=True)) for pair, row in zip(pairs, mean.tolist(), strict=True)}

    def union(self, other: "NeuronMasks") -> "NeuronMasks":
        """Keep the neurons that either of two masks of the same model and rows keeps.

        Raises:
            ValueError: if the models, the pairs, their rows or their tokens differ.
        """
        return combined(self, other, "union")

    def intersection(self, other: "NeuronMasks") -> "NeuronMasks":
        """Keep the neurons that both of two masks of the same model and rows keep.

        Raises:
            ValueError: as `union` does, or if a row would keep no neuron.
        """
        return combined(self, other, "intersection")

    def concatenate(self, other: "NeuronMasks") -> "NeuronMasks":
        """Return the pairs of both masks, which were made for one model, by the same person or by different ones.

        Raises:
            ValueError: if the models differ, or a row or a pair of both is not the same in both.
        """
        return joined(self, other)

    def only(self, stack: str) -> "NeuronMasks":
        """Restrict to one stack: the other keeps all its neurons (the paper's Ours-Enc and Ours-Dec)."""
        if stack not in STACKS:
            raise ValueError(f"Expected 'encoder' or 'decoder', got {stack!r}.")
        rows = {
            name: rows if self.stacks[name] == stack else torch.ones_like(rows) for name, rows in self.rows.items()
        }
        return replace(self, rows=rows, selector={**self.selector, "only": stack})

    def factorize(self) -> "NeuronMasks":
        """Return masks with one encoder row per source language and one decoder row per target language.

        Where pairs that share a language disagree, the language keeps what any of them keeps.

        Raises:
            ValueError: if the source side carries the target's tag: encoder rows then depend on the target.
        """
        if self.routes.source_tag == "target":
            raise ValueError(
                "These masks cannot be factorized: in this model the source side carries the target's tag (the Marian "
                "and MADLAD/T5 convention), so encoder rows depend on the target as well as on the source."
            )
        pairs = self.language_pairs
        languages = [list(dict.fromkeys(split_pair(pair)[side] for pair in pairs)) for side in (0, 1)]
        rows = {}
        for name, old in self.rows.items():
            side = 0 if self.stacks[name] == ENCODER else 1
            merged = torch.zeros(len(languages[side]), old.shape[1], dtype=torch.bool)
            for pair in pairs:
                merged[languages[side].index(split_pair(pair)[side])] |= self.row(pair, name)
            rows[name] = merged
        return replace(self, rows=rows, routes=Routes.per_language(languages[0], languages[1], pairs))

    def compose(self, pair: str, pivot: str | None = None) -> "NeuronMasks":
        """Return these masks with the zero-shot `pair` added: X→pivot's encoder row, pivot→Y's decoder row.

        Raises:
            ValueError: if a half is missing, if several pivots disagree, or if the source carries the target's tag.
        """
        listed = {**self.routes.listed, pair: self.routes.route(pair, pivot)}
        return replace(self, routes=replace(self.routes, listed=listed))

    def metadata(self) -> dict[str, Any]:
        """Return the mask-related part of adapter_config.json."""
        return {
            "format_version": adapter_file.FORMAT_VERSION,
            **self.routes.metadata(),
            "d_ff": self.d_ff,
            "stacks": dict(self.stacks),
            "selector": dict(self.selector),
            "fingerprint": dict(self.fingerprint),
            "language_token_ids": self.language_token_ids,
            "base_model_name_or_path": self.base_model_name_or_path,
            "weights_sample": self.weights_sample,
        }

    def save_pretrained(self, directory: str | PathLike[str], overwrite: bool = False) -> None:
        """Write an adapter directory that holds only masks; PEFT loads it like any adapter (`trainable="none"`).

        Args:
            directory: where to write; files of an earlier adapter of this method there are replaced, others stay.
            overwrite: also replace files of the same names that this package did not write.

        Raises:
            ValueError: if `directory` holds a model, or files of these names that this package did not write.
        """
        adapter_file.check_holds_no_model(directory)
        tensors = {adapter_file.mask_key(name): adapter_file.pack_rows(rows) for name, rows in self.rows.items()}
        config: dict[str, Any] = {
            "peft_type": adapter_file.PEFT_TYPE,
            "task_type": "SEQ_2_SEQ_LM",
            "inference_mode": True,
            "trainable": "none",
            "target_modules": list(self.rows),
            **self.metadata(),
        }
        for name, rows in self.rows.items():
            adapter_file.check_packed_rows(
                adapter_file.mask_key(name), tensors[adapter_file.mask_key(name)], *rows.shape
            )
        with atomic_directory(directory, overwrite) as fresh:
            save_file(tensors, fresh / adapter_file.WEIGHTS_NAME, metadata={"format": "pt"})
            config["weights_digest"] = adapter_file.file_digest(fresh / adapter_file.WEIGHTS_NAME)
            (fresh / adapter_file.CONFIG_NAME).write_text(
                json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
            )
            write_card(fresh, config, {name: tensors[adapter_file.mask_key(name)] for name in self.rows})

    def push_to_hub(self, repo_id: str, *, token: str | bool | None = None, private: bool | None = None) -> str:
        """Write the adapter directory to a Hub repository, created if missing, and return its address.

        A card that was edited on the Hub stays.

        Args:
            repo_id: Hub id, such as "me/nllb-masks".
            token: see `huggingface_hub.HfApi`.
            private: whether a new repository is private; None for the default of its owner.

        Raises:
            ValueError: if `private` is asked of a repository that exists and is public; nothing is uploaded then.
        """
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            repo_id = adapter_file.make_repository(api, repo_id, private)
            keep_card_of_hub(api, repo_id, folder)
            describe_adapter(folder, CardFacts(repo_id=repo_id))
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=[WRITTEN]))

    @classmethod
    def from_pretrained(cls, location: str | PathLike[str], **hub: Any) -> "NeuronMasks":
        """Read the masks of an adapter directory or Hub repository; trained tensors beside them are not read.

        Args:
            location: directory, or Hub id.
            **hub: passed to `huggingface_hub.hf_hub_download`, such as `revision`, `token` or `subfolder`.

        Raises:
            ValueError: if it is not such an adapter, or its masks do not fit its config.
        """
        if Path(location).is_dir():
            location = Path(location, hub.pop("subfolder", None) or "")
        config = adapter_file.read_config(location, **hub)
        path = adapter_file.fetch_weights(location, **hub)
        adapter_file.verify_digest(config.get("weights_digest"), path, location)
        routes = Routes.from_metadata(config)
        rows, tensors = {}, adapter_file.read_weights(path)
        stacks = {name: config["stacks"][name] for name in in_order(config["d_ff"], config["stacks"])}
        for name, stack in stacks.items():
            width = config["d_ff"][name]
            key = adapter_file.mask_key(name)
            if key not in tensors:
                raise ValueError(f"{path} lacks {key}, which its {adapter_file.CONFIG_NAME} lists.")
            count = len(routes.row_names(stack))
            adapter_file.check_packed_rows(key, tensors[key], count, width)
            rows[name] = adapter_file.unpack_rows(tensors[key], width)
        origin = {name: config.get(name) for name in ORIGIN}
        base = origin["base_model_name_or_path"]
        if base and not Path(base).exists():
            with suppress(ValueError):  # without a card, who knows
                if names_no_base(adapter_file.fetch(location, CARD_NAME, **hub)):
                    origin["base_model_name_or_path"] = None  # a directory of elsewhere, not to be taken for a Hub id
        return cls(rows, stacks, routes, config["selector"], config["fingerprint"], **origin)


def intersection_over_union(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return |a ∧ b| / |a ∨ b| of two bool tensors of one shape; 1 where both are empty."""
    union = (a | b).sum().item()
    return (a & b).sum().item() / union if union else 1.0
