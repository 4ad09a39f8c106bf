"""Dropout of models whose configuration says otherwise."""

from torch import nn


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set the probability of every dropout, where modules keep it as `dropout` or are dropout layers themselves."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = probability  # type: ignore[assignment]
