"""Which token positions of a batch count: those that are not padding."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

IGNORED = -100  # label that the loss leaves out


def source_positions(batch: Mapping[str, Any], config: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return where the encoder counts, bool [batch, length], or None: everywhere; and the padding found by its token.

    The second is bool of the same shape where there is no `attention_mask` to tell, else None.
    """
    mask, tokens = batch.get("attention_mask"), batch.get("input_ids")
    pad = getattr(config, "pad_token_id", None)
    if mask is not None or tokens is None or pad is None:
        return mask, None
    padding = _outer_padding(tokens, config) & (tokens == pad)
    return ~padding, padding


def target_positions(batch: Mapping[str, Any], config: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return where the decoder counts, bool [batch, length], and the padding tokens among labels, or None.

    Labels that are padding tokens are padding, as in the output of `tokenizer(..., text_target=..., padding=True)`.

    Raises:
        ValueError: if the batch has neither labels nor decoder inputs.
    """
    labels, tokens = batch.get("labels"), batch.get("decoder_input_ids")
    pad = getattr(config, "pad_token_id", None)
    if labels is not None:
        padding = None if pad is None else _outer_padding(labels, config) & (labels == pad)
        return (labels != IGNORED) if padding is None else (labels != IGNORED) & ~padding, padding
    if tokens is None:
        raise ValueError("A batch to record needs labels or decoder_input_ids beside input_ids (teacher forcing).")
    if batch.get("decoder_attention_mask") is not None:
        return batch["decoder_attention_mask"], None
    real = torch.ones_like(tokens, dtype=torch.bool) if pad is None else tokens != pad
    real[:, 0] = True  # the start token is a position even where it is the padding token (T5)
    return real, None


def _outer_padding(tokens: torch.Tensor, config: Any) -> torch.Tensor:
    """Return where rows begin or end with padding tokens or ignored labels: bool [batch, length].

    Where the padding token also ends sentences, the first one after a sentence is its end and not padding. Inside a
    sentence it is an ordinary token: some models use their unknown token for padding.
    """
    empty = (tokens == config.pad_token_id) | (tokens == IGNORED)
    trailing = empty.int().flip(1).cumprod(1).flip(1).bool()
    leading = empty.int().cumprod(1).bool() & ~trailing
    ends = getattr(config, "eos_token_id", None)
    if config.pad_token_id in (ends if isinstance(ends, list) else [ends]):
        trailing = trailing & nn.functional.pad(trailing, (1, 0))[:, :-1]
    return leading | trailing


def fit_positions(positions: torch.Tensor | None, computed: torch.Tensor, stack: str) -> torch.Tensor:
    """Return positions of the shape that a block computes, [batch, length].

    Blocks may compute more positions than the batch has (windows are padded; ProphetNet's future streams follow the
    main one), which do not count, or fewer (speech is shortened), each of which then stands for several.

    Args:
        positions: where to count, [batch, length of the batch], or None: everywhere.
        computed: what the block computes, [batch, length, d_ff].
        stack: the block's, for the error.

    Raises:
        ValueError: if the block computes another number of rows than the batch has.
    """
    if positions is None:
        return torch.ones(computed.shape[:2], device=computed.device)
    if positions.shape[0] != computed.shape[0]:
        raise ValueError(
            f"The {stack} computes a batch of {computed.shape[0]}, but the batch given has {positions.shape[0]} "
            "rows; cannot tell which positions are padding."
        )
    given, length = positions.shape[1], computed.shape[1]
    if length >= given:
        return nn.functional.pad(positions, (0, length - given))
    return positions[:, torch.arange(length, device=positions.device) * given // length]
