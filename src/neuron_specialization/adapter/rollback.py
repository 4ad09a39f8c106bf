"""Injecting an adapter succeeds, or leaves the model exactly as it was."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from . import frozen_rows
from .routing import CallRouter


@contextmanager
def rolled_back_on_error(model: nn.Module) -> Iterator[None]:
    """Restore every module of `model` to its present state if the body raises.

    Injection replaces children, adds parameters and buffers to existing layers, registers hooks, sets attributes,
    freezes parameters and adds language pairs to the router. Except for the last two, all of this is stored in the
    dictionaries of modules, and these are restored; the values of tensors are not copied.
    """
    classes = [(module, type(module)) for module in model.modules()]
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    values = [value for _, kept in attributes for value in kept.values()]
    values += [router.resolvers for router in values if isinstance(router, CallRouter)]
    contents = [(value, copy.copy(value)) for value in values if isinstance(value, dict | list | set)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    known = set(model.modules())
    try:
        yield
    except BaseException:
        for module in model.modules():
            if module not in known:
                frozen_rows.release(module)
        for module, kind in classes:
            if type(module) is not kind:  # projections that run compact change their class in place
                module.__class__ = kind
        for current, kept in attributes:
            current.clear()
            current.update(kept)
        for container, content in contents:  # in place: handles of hooks refer to these very objects
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise
