"""The tuner: injects masked projections into a model, and answers PEFT's calls about them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ..neurons.adapter_file import PREFIX, check_packed_rows, pack_rows
from ..neurons.base_model import make_trainable
from ..neurons.ffn import (
    ENCODER,
    FfnBlock,
    find_ffn_blocks,
    fingerprint,
    same_weights,
    sample_weights,
    stack_of,
)
from . import attachment, routing, storage
from .call import per_sample_adapters
from .compact import CompactBlock
from .config import NeuronSpecializationConfig
from .layer import Linear, NeuronSpecializationLayer
from .merging import check_merge
from .pair_resolver import resolver_of
from .rollback import rolled_back_on_error


class NeuronSpecializationModel(BaseTuner):
    """Masks the FFN neurons of a model per language pair (Neuron Specialization, arXiv 2404.11201).

    `get_peft_model` creates one; users rarely call it directly.
    """

    prefix = PREFIX
    tuner_layer_cls = NeuronSpecializationLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # PEFT's own models come with a dict; a single config means that transformers injects
        by_transformers = isinstance(peft_config, PeftConfig) and isinstance(model, PreTrainedModel)
        first = "peft_config" not in vars(model)
        try:
            with rolled_back_on_error(model):
                super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except Exception:
            if by_transformers and first:
                vars(model).pop("_hf_peft_config_loaded", None)  # set before injection
            raise
        if by_transformers:
            config: Any = self.peft_config[adapter_name]
            masks = {name: model.get_submodule(name).neuron_specialization_mask for name in config.d_ff}
            vars(config)["masks_in_model"] = masks, adapter_name

    def set_language_pair(self, pair: str | None) -> None:
        """Select the pair for calls that pass none; None clears the selection."""
        routing.set_language_pair(self.model, pair)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Check that the masks fit the model, then replace its masked projections."""
        config: Any = self.peft_config[adapter_name]
        given = dict(vars(config))
        try:
            with rolled_back_on_error(self):
                self._inject(model, adapter_name, config, *args, **kwargs)
        except Exception:
            vars(config).update(given)
            raise

    def _inject(self, model: nn.Module, adapter_name: str, config: Any, *args: Any, **kwargs: Any) -> None:
        self._check_other_adapters()
        storage.take_stored_masks(config)
        self._blocks = _find_blocks(config, model)
        self._places = _places(model)
        router = attachment.attach(model)
        router.resolvers[adapter_name] = resolver_of(config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if config.weights_file is not None:
            storage.check_file(model, config, adapter_name, config.weights_file)
            config.weights_file = None
        layers = [
            n for n, m in model.named_modules() if isinstance(m, self.tuner_layer_cls) and adapter_name in m.mask_bias
        ]
        config.d_ff = {name: config.d_ff[name] for name in layers}
        config.stacks = {name: config.stacks[name] for name in layers}

    def _check_other_adapters(self) -> None:
        trained = [n for n, c in self.peft_config.items() if getattr(c, "trainable", None) == "full"]
        if trained and len(self.peft_config) > 1:
            raise ValueError(
                f"Adapter {trained[0]!r} has trainable='full', which changes the base itself, so no other adapter can "
                f"share that base (here: {', '.join(n for n in self.peft_config if n != trained[0])}). Load it alone."
            )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = set(peft_config.masks.rows if peft_config.masks else self._blocks)
        if not peft_config.fingerprint and self._blocks:
            peft_config.fingerprint = fingerprint(self.model, list(self._blocks.values()))
            peft_config.weights_sample = sample_weights(list(self._blocks.values()))
        for name in ("selector", "fingerprint"):  # of a model without FFN blocks, and without masks
            setattr(peft_config, name, getattr(peft_config, name) or {})
        peft_config.d_ff = peft_config.d_ff or {}
        peft_config.stacks = peft_config.stacks or {}
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        linear: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(getattr(linear, "out_features", None), int):
            raise TypeError(
                f"{current_key} is a {type(linear).__name__}; neurons are masked at the output of linear layers only. "
                "Name linear layers in target_modules, or leave it out to mask every FFN block."
            )
        if len(self._places[linear]) > 1:
            raise ValueError(
                f"{' and '.join(self._places[linear])} are one module, which cannot hold the masks of several places. "
                "Load the model with its projections untied."
            )
        if peft_config.trainable == "low_rank" and peft_config.r > max(linear.in_features, linear.out_features):
            raise ValueError(
                f"r={peft_config.r} is larger than both widths of {current_key} ({linear.in_features} and "
                f"{linear.out_features}); a low rank is a fraction of them."
            )
        block = self._blocks.get(current_key)
        stored = (peft_config.masks.stacks if peft_config.masks else peft_config.stacks) or {}
        stack = stored.get(current_key) or (block.stack if block else stack_of(self.model, current_key))
        peft_config.d_ff[current_key] = linear.out_features
        peft_config.stacks[current_key] = stack
        fresh = not isinstance(target, NeuronSpecializationLayer)
        layer: Any = Linear(target, adapter_name, attachment.attach(self.model), stack) if fresh else target
        layer.update_layer(
            adapter_name,
            _initial_mask(peft_config, current_key, stack, linear.out_features),
            peft_config,
        )
        if fresh:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
            layer.place = parent, target_name
        if fresh and block is not None:
            layer.compact_block = CompactBlock(layer, block, self.model, self._places)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        for adapter in self.active_adapters:
            config: Any = self.peft_config[adapter]
            if config.trainable == "full" and not config.inference_mode:
                make_trainable(model)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if getattr(self, "_is_replica", False):
            raise ValueError(
                "torch.nn.DataParallel copies a model to several GPUs, and masks with their routes stay with the "
                "original. Start one process for each GPU with `accelerate launch`, or show one GPU with "
                "CUDA_VISIBLE_DEVICES=0."
            )
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted({name for name in names if name != "__base__"} - set(self.peft_config))
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        # PEFT's own wrappers (modules_to_save, trained tokens) take the names as an argument
        handles = [
            module.register_forward_pre_hook(partial(_pass_adapter_names, list(names)), with_kwargs=True)
            for module in self.modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
        ]
        try:
            with per_sample_adapters(list(names)):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # new layers move to their base layer's device by themselves, and the inherited method would assign the weight
        # of a PEFT wrapper that is being unloaded, which is not a parameter
        setattr(parent, child_name, new_module)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge one language pair into the base weights, or refuse and change nothing; see PEFT's method."""
        check_merge(self.model, NeuronSpecializationLayer, adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            check_merge(self.model, NeuronSpecializationLayer, adapter_names, safe_merge)
        for layer in [m for m in self.model.modules() if isinstance(m, NeuronSpecializationLayer)]:
            layer.release()
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        attachment.detach(self.model)
        return model

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if config.trainable == "full":
            if any(isinstance(layer, NeuronSpecializationLayer) and layer.merged for layer in model.modules()):
                raise ValueError(
                    "trainable='full' saves the base's weights, but a language pair is merged into them: what the "
                    "other pairs learned would be lost. Call unmerge_adapter() before saving."
                )
            selected |= {name: state_dict[name] for name in storage.base_parameter_names(model)}
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        storage.check_tensors(model, config, adapter_name, remapped)
        return remapped


def _pass_adapter_names(
    names: list[str], module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook: pass each sample's adapter name, once per beam, to one of PEFT's own wrappers."""
    beams = max(1, len(args[0]) // len(names))
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(beams)]}


def _find_blocks(config: NeuronSpecializationConfig, model: nn.Module) -> dict[str, FfnBlock]:
    """Return the model's FFN blocks by name, after checking that the config's masks were made for this model.

    Raises:
        ValueError: if no FFN block is found though none is named, or the masks were made for another model.
    """
    try:
        blocks = {block.name: block for block in find_ffn_blocks(model)}
    except ValueError:
        if config.target_modules is None or config.fingerprint:
            raise
        return {}
    if config.fingerprint:
        found = fingerprint(model, list(blocks.values()))
        modules = dict(model.named_modules())
        widths = {name: getattr(modules.get(name), "out_features", None) for name in config.d_ff or {}}
        if config.fingerprint != found or widths != config.d_ff:
            absent = [name for name in config.d_ff or {} if name not in modules]
            raise ValueError(
                "These masks were made for another model. They expect "
                f"{_describe(config.fingerprint, config.d_ff or {})}, but this model has "
                f"{_describe(found, {name: block.d_ff for name, block in blocks.items()})}"
                f"{f', and no module {absent[0]}' if absent else ''}. Load the checkpoint they were identified on, "
                "with the same class, or identify masks on this one."
            )
        if not same_weights(config.weights_sample, sample_weights(list(blocks.values()))):
            warnings.warn(
                "These masks were identified on a model of this architecture with other weights"
                + (f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else "")
                + ". That is expected only where this model continues the training of that one.",
                stacklevel=2,
            )
    return blocks


def _places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Return module → every name it has in the model."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    return places


def _initial_mask(config: NeuronSpecializationConfig, name: str, stack: str, width: int) -> torch.Tensor:
    """Return packed rows: the config's masks, else rows that keep all, or random ones if `init_weights` is off."""
    if config.masks is not None:
        if name not in config.masks.rows:  # type: ignore[union-attr]
            raise ValueError(f"target_modules names {name}, but the masks have no row for it.")
        rows: torch.Tensor = config.masks.rows[name]  # type: ignore[union-attr]
        packed = pack_rows(rows)
        check_packed_rows(name, packed, *rows.shape)  # what could not be loaded again
        return packed
    count = len((config.encoder_rows if stack == ENCODER else config.decoder_rows) or [])
    if config.init_weights:
        # one row packed, then copied: a file of 10,000 pairs waits for this before it is read
        return pack_rows(torch.ones(width, dtype=torch.bool)).repeat(count, 1)
    mask = torch.rand(count, width) < 0.5
    mask[:, 0] = True
    return pack_rows(mask)


def _describe(fingerprint: dict[str, str | int], d_ff: dict[str, int]) -> str:
    widths = sorted(set(d_ff.values()))
    return f"{', '.join(f'{k} {v}' for k, v in fingerprint.items())}, d_ff {widths} in {len(d_ff)} blocks"
