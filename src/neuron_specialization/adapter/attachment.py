"""Attach the routing to a base model, so that its calls find their pairs however the adapter was injected."""

from typing import Any

import torch
from torch import nn

from ..neurons.base_model import is_encoder_decoder
from ..neurons.ffn import is_time_major
from .language_tokens import tokens_of_forward, tokens_of_generate
from .routing import ATTRIBUTE, Routing


class _BeforeForward:
    """Forward pre-hook of the base model: finds the pairs of the call. A class, so that it pickles."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        pairs = kwargs.pop("language_pairs", None)
        if not self.routing.generating:
            self.routing.enter()
            try:
                self.routing.begin(pairs, tokens_of_forward(args, kwargs), _device_of(module))
            except ValueError:
                self.routing.leave()
                raise
        return args, kwargs


class _AfterForward:
    """Forward hook of the base model, called on errors too: the pairs stay, another thread may come."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self.routing.generating:
            self.routing.leave()


class _RoutedGenerate:
    """`generate` of the base model: fixes the pairs before the encoder runs, then calls the model's own."""

    def __init__(self, model: Any, routing: Routing) -> None:
        self.model = model
        self.routing = routing

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        pairs = kwargs.pop("language_pairs", None)
        readers = [table.reader for table in self.routing.tables.values() if table.reader is not None]
        ids = {token for reader in readers for token in reader.ids.values()}
        batch = tokens_of_generate(self.model, ids, args, kwargs)
        with self.routing.generation(pairs, batch, _device_of(self.model)):
            return type(self.model).generate(self.model, *args, **kwargs)


def _device_of(model: nn.Module) -> torch.device | None:
    parameter = next(model.parameters(), None)
    return None if parameter is None else parameter.device


def attach(model: nn.Module) -> Routing:
    """Return the routing of a base model, attaching one if there is none."""
    routing = getattr(model, ATTRIBUTE, None)
    if routing is None:
        routing = Routing(time_major=is_encoder_decoder(model) and is_time_major(model))
        setattr(model, ATTRIBUTE, routing)
        model.register_forward_pre_hook(_BeforeForward(routing), with_kwargs=True)
        model.register_forward_hook(_AfterForward(routing), always_call=True)
        if callable(getattr(model, "generate", None)):
            model.generate = _RoutedGenerate(model, routing)  # type: ignore[assignment]
    return routing


def detach(model: nn.Module) -> None:
    """Take the routing of a base model away again."""
    if not hasattr(model, ATTRIBUTE):
        return
    delattr(model, ATTRIBUTE)
    vars(model).pop("generate", None)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, _BeforeForward | _AfterForward)]:
            del hooks[key]
            for flags in (model._forward_pre_hooks_with_kwargs, model._forward_hooks_always_called):
                flags.pop(key, None)
