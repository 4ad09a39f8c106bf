"""Attach the router to a base model, so that its calls find their pairs however the adapter was injected.

Instance attributes replace `forward` and `generate` of the base model, and `forward` of its two stacks. Hooks would
not do: torch runs none of them when a call is interrupted, and users may call `forward` directly.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..neurons.adapter_file import MASK
from ..neurons.base_model import is_encoder_decoder
from ..neurons.ffn import ENCODER, STACKS, is_time_major
from .call import Call, CarriesCall, innermost_call, origin_of, remember_origin, run_in, steps_in
from .language_tokens import tokens_of_forward, tokens_of_generate, tokens_of_stack
from .routing import ATTRIBUTE, CallRouter
from .target_tag import target_arguments

_INPUTS = ("input_ids", "inputs", "inputs_embeds", "input_features", "decoder_input_ids", "labels")


class _Entry:
    """Replaces a method of the base model, or of one of its stacks, with which a call may begin."""

    method = "forward"

    def __init__(self, router: CallRouter, module: Any, stack: str | None = None) -> None:
        self.router, self.module, self.stack = router, module, stack
        self.own = vars(module).get(self.method)  # an instance's own method, if it had one before
        self.checkpointed = [part for part in module.modules() if hasattr(part, "gradient_checkpointing")]
        setattr(module, self.method, self)

    @property
    def __signature__(self) -> inspect.Signature:
        """The method's own signature, with `language_pairs` in the model's forward: Trainer and generate inspect which
        arguments it takes, and Trainer drops columns of the data that it does not."""
        own = inspect.signature(self.own or getattr(type(self.module), self.method).__get__(self.module))
        if self.stack is not None or self.method != "forward" or "language_pairs" in own.parameters:
            return own
        pairs = inspect.Parameter("language_pairs", inspect.Parameter.KEYWORD_ONLY, default=None)
        named = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        others = [p for p in own.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
        return own.replace(parameters=[*named, pairs, *others])

    def _whole(self, *args: Any, **kwargs: Any) -> Any:
        if self.own is not None:
            return self.own(*args, **kwargs)
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.module:  # accelerate binds whatever it finds as `forward` to the model
            args = args[1:]
        pairs = kwargs.pop("language_pairs", None)
        if pairs is None and self._goes_on(args, kwargs):
            return self._whole(*args, **kwargs)
        return self._begin(pairs, *args, **kwargs)

    def _goes_on(self, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        """Whether this is a part of the call that is running."""
        call = innermost_call(self.router)
        if call is None:
            return False
        if not torch.compiler.is_compiling() and self.router.chosen_since(call):
            return False
        # of the forward passes inside `generate`, its own ones see the source as the encoder's output
        return self.stack is not None or (call.generates and _sees_only_encoder_outputs(args, kwargs))

    @torch.compiler.disable(recursive=False)
    def _begin(self, pairs: Any, *args: Any, **kwargs: Any) -> Any:
        self._carry_calls_through_checkpoints()
        inputs = _inputs(args, kwargs)
        call = self.router.begin(
            pairs,
            self._tokens(args, kwargs),
            samples=None if inputs is None else len(inputs),
            origin=_origin(kwargs),
            stack=self.stack,
            device=None if inputs is None else inputs.device,
            generates=self.method == "generate",
        )
        return self._finish(call, run_in(call, self._whole, *args, **self._arguments(call, kwargs)))

    def _arguments(self, call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
        return kwargs

    def _tokens(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        named = kwargs if len(args) < 2 else {**self._by_name(args), **kwargs}
        return tokens_of_forward(args, named) if self.stack is None else tokens_of_stack(self.stack, args, named)

    def _by_name(self, args: tuple) -> dict[str, Any]:
        """Return what is passed by position, by name; {} for a method that does not name what it takes."""
        parameters = list(self.__signature__.parameters.values())[: len(args)]
        if not all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in parameters):
            return {}
        return {parameter.name: value for parameter, value in zip(parameters, args, strict=False)}

    @torch.compiler.disable
    def _finish(self, call: Call, outputs: Any) -> Any:
        if isinstance(outputs, Mapping) and self.stack in (None, ENCODER):
            remember_origin(call, outputs)
        return outputs

    @torch.compiler.disable
    def _carry_calls_through_checkpoints(self) -> None:
        """Wrap the layers' checkpointing functions, which users may switch on at any time."""
        for module in self.checkpointed if torch.is_grad_enabled() else ():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None and not isinstance(function, CarriesCall):
                module._gradient_checkpointing_func = CarriesCall(function)

    def remove(self) -> None:
        """Put back what was there before."""
        for module in self.checkpointed:
            function = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(function, CarriesCall):
                module._gradient_checkpointing_func = function.checkpoint
        if vars(self.module).get(self.method) is not self:
            return  # it has been wrapped since, and the wrapper keeps calling it
        delattr(self.module, self.method)
        if self.own is not None:
            setattr(self.module, self.method, self.own)


class _Generate(_Entry):
    """The pairs are found before the encoder runs, and hold until the last token."""

    method = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = self._by_name(args)  # inputs, generation_config, ...
        return super().__call__(*args[len(named) :], **named, **kwargs)

    def _goes_on(self, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        return False

    def _tokens(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        readers = [resolver.reader for resolver in self.router.resolvers.values() if resolver.reader is not None]
        ids = {token for reader in readers for token in reader.ids.values()}
        return tokens_of_generate(self.module, ids, args, kwargs)

    def _arguments(self, call: Call, kwargs: dict[str, Any]) -> dict[str, Any]:
        names = call.adapter_names or _active_adapters(self.module)
        resolvers = [self.router.resolvers[name] for name in dict.fromkeys(names) if name in self.router.resolvers]
        return {**kwargs, **target_arguments(self.module, call, resolvers, kwargs)}

    def _finish(self, call: Call, outputs: Any) -> Any:
        return steps_in(call, outputs) if inspect.isgenerator(outputs) else outputs


def _active_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters that run in a model's masked layers; none while they are disabled."""
    layers = (part for part in model.modules() if isinstance(part, BaseTunerLayer) and hasattr(part, MASK))
    return next(([] if layer.disable_adapters else layer.active_adapters for layer in layers), [])


def _sees_only_encoder_outputs(args: tuple, kwargs: Mapping[str, Any]) -> bool:
    sources = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "input_features", "input_values"))
    return not args and kwargs.get("encoder_outputs") is not None and all(source is None for source in sources)


def _origin(kwargs: Mapping[str, Any]) -> Any:
    """Return the call whose cache or encoder states this one continues, if it is known."""
    outputs = kwargs.get("encoder_outputs")
    states = outputs[0] if outputs is not None else kwargs.get("encoder_hidden_states")
    return origin_of(kwargs.get("past_key_values")) or origin_of(states)


def _inputs(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return a tensor [batch, ...] of those that a call is given."""
    inputs = [*args[:1], *(kwargs.get(name) for name in _INPUTS)]
    return next((value for value in inputs if isinstance(value, torch.Tensor)), None)


def attach(model: nn.Module) -> CallRouter:
    """Return the router of a base model, attaching one if there is none.

    Raises:
        ValueError: if the model shares masked layers with another one.
    """
    router = getattr(model, ATTRIBUTE, None)
    if router is None:
        shared = [name for name, part in model.named_modules() if any(_entries(part)) and part is not model]
        if shared:
            raise ValueError(
                f"{shared[0]} is also another model's, which has an adapter of this method. Masks belong to one "
                "model: give this one a copy (copy.deepcopy) before adding an adapter."
            )
        router = CallRouter(time_major=is_encoder_decoder(model) and is_time_major(model))
        setattr(model, ATTRIBUTE, router)
        _Entry(router, model)
        if callable(getattr(model, "generate", None)):
            _Generate(router, model)
        for stack, module in _stacks(model):
            _Entry(router, module, stack)
    return router


def detach(model: nn.Module) -> None:
    """Remove the router of a base model."""
    router = vars(model).pop(ATTRIBUTE, None)
    for entry in [entry for part in model.modules() for entry in _entries(part) if entry.router is router]:
        entry.remove()


def _entries(module: nn.Module) -> list[_Entry]:
    return [value for value in vars(module).values() if isinstance(value, _Entry)]


def _stacks(model: Any) -> list[tuple[str, nn.Module]]:
    """Return the encoder and the decoder of an encoder-decoder model."""
    parts = [(stack, getattr(model, f"get_{stack}")()) for stack in STACKS] if is_encoder_decoder(model) else []
    return [(stack, part) for stack, part in parts if part is not model]
