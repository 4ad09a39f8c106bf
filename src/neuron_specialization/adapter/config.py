"""The adapter's configuration: what the user chooses, and what adapter_config.json stores about the tensors."""

from contextlib import suppress
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig

from ..neurons import adapter_file
from ..neurons.card import write_card
from ..neurons.files import complete_writing
from ..neurons.language_pairs import DEFAULT_PAIR, Routes, check_source_tag
from ..neurons.masks import NeuronMasks
from .registration import NATIVE_OR_OWN

TRAINABLE = ("none", "delta", "low_rank", "full")
EXECUTION = ("auto", "masked", "compact")
BASE_PAIR = "base"


@dataclass
class NeuronSpecializationConfig(PeftConfig):
    """Configuration of a neuron specialization adapter.

    Built with nothing, it has one pair, "default", that keeps every neuron.

    Args:
        masks: the neurons of each pair: `NeuronMasks`, or the directory or Hub id of an adapter that holds them. Never
            written to JSON.
        language_pairs: names of the pairs; a pair's id is its position. Masks name their own. Without masks, these
            pairs keep every neuron. Pairs that only follow from factorized rows are not listed.
        trainable: what trains under the masks. "none": nothing. "delta": one ΔW1 per FFN block, shared by all pairs
            and masked per pair; the base stays intact. "low_rank": ΔW1 = B·A. "full": every base parameter (the
            paper's continued training); the adapter directory then holds them all.
        r: rank of "low_rank".
        mask_bias: masked neurons output act(0), which is 0 for all but unusual activations (sigmoid). By default they
            output the constant act(b1), as in the paper.
        update_only: mask the update instead of W1: a pair runs with W1 + m ⊙ ΔW1, and all neurons are computed. Before
            training it is the base exactly. Needs "delta" or "low_rank"; excludes compact execution and export.
        execution: "masked" computes all neurons and then masks; "compact" computes only those kept (and a few more,
            to pad the width) and raises an error where that is not possible; "auto" runs compact where it is possible
            (one pair in the batch, plain weights, nothing else attached to the block, no activation dropout in
            training) and pays: from 256 tokens on, and in the decoder steps of a `generate`.
        protected_pairs: pairs whose outputs must not change in training: the rows of ΔW1 that they use are frozen, and
            other pairs train the rows that only they use. Needs "delta".
        language_token_ids: language code → id of its token in the tokenizer (see `ns.language_token_ids`).
        source_tag: what the tag on the source side names: "source" (NLLB, M2M100, mBART) or "target" (Marian, T5).
        default_pair: pair to fall back to; "base" runs the base model without masks.
        target_modules: modules to mask instead of every FFN block: a list of names or suffixes, or a regular
            expression. May name any linear layer.
        exclude_modules: modules to leave out although `target_modules` matches them.
        modules_to_save: other modules to train, and to save with all their weights.
        trainable_token_indices: embedding rows to train and to save.
        init_weights: False fills masks and deltas at random, to make their effect visible in tests.

    The remaining fields describe the stored masks and are filled in by the package: `format_version`, `encoder_rows`
    and `decoder_rows` (names), `routes` (`[encoder row, decoder row]` of each pair), `d_ff` and `stacks` per block,
    `selector`, `fingerprint` and `weights_sample` of the base, `weights_digest`, and `other_tensors`, names of stored
    tensors that are not the method's own: whole modules, token rows, resized embeddings.
    """

    masks: NeuronMasks | str | PathLike[str] | None = field(default=None, repr=False)
    language_pairs: list[str] | None = None
    trainable: str = "delta"
    r: int = 8
    mask_bias: bool = False
    update_only: bool = False
    execution: str = "auto"
    protected_pairs: list[str] | None = None
    language_token_ids: dict[str, int] | None = None
    source_tag: str = "source"
    default_pair: str | None = None
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_weights: bool = True
    format_version: int = adapter_file.FORMAT_VERSION
    encoder_rows: list[str] | None = None
    decoder_rows: list[str] | None = None
    routes: list[list[int]] | None = None
    d_ff: dict[str, int] | None = None
    stacks: dict[str, str] | None = None
    selector: dict[str, Any] | None = None
    fingerprint: dict[str, str | int] | None = None
    weights_sample: list[float] | None = None
    weights_digest: str | None = None
    other_tensors: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NATIVE_OR_OWN
        # the file that holds this adapter's weights, for injection to check; None where it is a new adapter
        self.weights_file: Path | None = None
        # where this config was read from, until PEFT has loaded the weights
        self.read_from: str | None = None
        # module → its packed masks by adapter, and this adapter's name, where transformers injected it: there the
        # config is saved first, when the weights beside it are still those of an older save
        self.masks_in_model: tuple[dict[str, Any], str] | None = None
        self._check_choices()
        adapter_file.check_format_version(self.format_version, adapter_file.CONFIG_NAME)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.masks, str | PathLike):
            self.masks = NeuronMasks.from_pretrained(self.masks)
        if self.masks is not None and not isinstance(self.masks, NeuronMasks):
            raise ValueError(
                "masks must be NeuronMasks, as a selector's select(counts) returns them, or the directory or Hub id "
                f"of an adapter; got a {type(self.masks).__name__}."
            )
        if self.masks is not None:
            self._take_masks(self.masks)
        elif self.encoder_rows is None:
            routes = Routes.per_pair(self.language_pairs or [DEFAULT_PAIR], self.source_tag)
            vars(self).update(routes.metadata())
        routes = self.build_routes()
        if self.default_pair not in (None, BASE_PAIR):
            routes.route(self.default_pair)
        for pair in self.protected_pairs or []:
            routes.route(pair)

    def build_routes(self) -> Routes:
        """Return which rows each pair uses.

        Raises:
            ValueError: if the stored rows, pairs and routes do not match.
        """
        return Routes.from_metadata(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """Return every field but `masks`, which are stored in the weights file."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "masks"}
        if isinstance(values["target_modules"], set):
            values["target_modules"] = sorted(values["target_modules"])
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json. PEFT calls this last, so the digest of the weights beside it is known by now."""
        weights = None if self.masks_in_model else adapter_file.newest_weights_file(save_directory)
        in_memory = self.weights_digest, self.other_tensors
        if weights is not None:
            self.weights_digest = adapter_file.file_digest(weights)
            others = [key for key in adapter_file.read_weights(weights) if adapter_file.PREFIX not in key]
            self.other_tensors = others if others and self.trainable != "full" else None
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.weights_digest, self.other_tensors = in_memory
        if weights is not None or self.masks_in_model:
            write_card(save_directory, self.to_dict(), self._packed_masks(weights))

    def _packed_masks(self, weights: Path | None) -> dict[str, torch.Tensor]:
        """Return block name → packed mask rows: those of a weights file, else those in the model."""
        if weights is None:
            of, adapter_name = self.masks_in_model or ({}, "")
            return {name: masks[adapter_name] for name, masks in of.items()}
        tensors = adapter_file.read_weights(weights)
        return {name: tensors[key] for name in self.d_ff or {} if (key := adapter_file.mask_key(name)) in tensors}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> "NeuronSpecializationConfig":
        """Read adapter_config.json, and check that the weights beside it are the ones it was written for."""
        with suppress(OSError):  # of a read-only directory; the digest then differs
            complete_writing(Path(pretrained_model_name_or_path, subfolder or ""))
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(config, cls):
            return config
        download, _, _ = cls._split_kwargs(kwargs)
        location = Path(pretrained_model_name_or_path, subfolder or "")
        if location.is_dir():
            expected = location / adapter_file.WEIGHTS_NAME if config.d_ff else None  # a config may be saved by itself
            config.weights_file = adapter_file.weights_file(location) or expected
        elif config.weights_digest is not None:
            config.weights_file = adapter_file.fetch_weights(
                pretrained_model_name_or_path, subfolder=subfolder, **download
            )
        if config.weights_file is not None:
            adapter_file.verify_digest(config.weights_digest, config.weights_file, pretrained_model_name_or_path)
        config.weights_digest = None
        config.read_from = str(pretrained_model_name_or_path)
        return config

    def _check_choices(self) -> None:
        for name, value, known in (
            ("trainable", self.trainable, TRAINABLE),
            ("execution", self.execution, EXECUTION),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}.")
        check_source_tag(self.source_tag)
        if type(self.r) is not int or self.r < 1:
            raise ValueError(f"r, the rank of trainable='low_rank', must be a positive integer; got {self.r!r}.")
        texts = {code: token for code, token in (self.language_token_ids or {}).items() if not isinstance(token, int)}
        if texts:
            raise ValueError(
                f"language_token_ids must map codes to token ids, got {texts}. Look them up with "
                "ns.language_token_ids(tokenizer, {code: token})."
            )
        if self.trainable == "full" and (self.modules_to_save or self.trainable_token_indices):
            raise ValueError(
                "trainable='full' already trains and saves every parameter of the base; leave out modules_to_save and "
                "trainable_token_indices."
            )
        if self.trainable == "full" and self.default_pair == BASE_PAIR:
            raise ValueError("default_pair='base' needs an untouched base, which trainable='full' does not keep.")

        if self.update_only:
            self._check_update_only()
        if self.protected_pairs:
            self._check_protectable()

    def _check_update_only(self) -> None:
        if self.trainable not in ("delta", "low_rank"):
            raise ValueError(
                "update_only=True masks ΔW1 and leaves W1 as it is, so it needs trainable='delta' or 'low_rank'; got "
                f"{self.trainable!r}."
            )
        for name, value in (("mask_bias", True), ("execution", "compact")):
            if getattr(self, name) == value:
                raise ValueError(
                    f"update_only=True masks no neuron, so {name}={value!r} has no meaning with it. Leave one of the "
                    "two out."
                )

    def _check_protectable(self) -> None:
        if self.trainable != "delta":
            raise ValueError(
                "protected_pairs freezes rows of ΔW1, so it needs trainable='delta', which leaves all else as it is; "
                f"got {self.trainable!r}."
            )
        if self.modules_to_save or self.trainable_token_indices:
            raise ValueError(
                "protected_pairs keeps what some pairs compute, but modules_to_save and trainable_token_indices train "
                "what all pairs share. Leave one of the two out."
            )

    def _take_masks(self, masks: NeuronMasks) -> None:
        if masks.routes.source_tag != self.source_tag:
            raise ValueError(
                f"These masks were identified with source_tag={masks.routes.source_tag!r}, but the config says "
                f"{self.source_tag!r}. Pass the tokenizer's convention to both."
            )
        listed = list(masks.routes.listed)
        if self.language_pairs is not None and self.language_pairs != listed:
            raise ValueError(
                f"The masks list the language pairs {listed}, but language_pairs says {self.language_pairs}. Leave "
                "language_pairs out: the masks name their own."
            )
        given = {name: getattr(self, name) for name in ("language_token_ids", "base_model_name_or_path")}
        vars(self).update(masks.metadata())
        vars(self).update({name: value for name, value in given.items() if value is not None})
