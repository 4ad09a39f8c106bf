"""Dropout of models whose configuration says otherwise."""

from torch import nn


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set the probability of every dropout, where modules keep it as `dropout` or are dropout layers themselves.

    Attention weights have one too. What is called otherwise, such as `activation_dropout` inside FFNs, stays.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        elif isinstance(getattr(module, "dropout", None), int | float):  # 0 where a configuration says so
            module.dropout = probability  # type: ignore[assignment]
