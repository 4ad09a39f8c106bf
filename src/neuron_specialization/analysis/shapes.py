"""Model shapes, random masks, random batches and a tokenizer of numbered words, for benchmarks."""

from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast

from ..neurons.ffn import DECODER, ENCODER, find_ffn_blocks
from ..neurons.language_pairs import Routes
from ..neurons.masks import NeuronMasks


@dataclass
class ModelShape:
    """Sizes of an M2M100-shaped model with random weights."""

    layers: int = field(default=6, metadata={"help": "Encoder layers, and decoder layers."})
    d_model: int = field(default=512, metadata={"help": "Width."})
    d_ff: int = field(default=2048, metadata={"help": "Neurons per layer."})
    vocab_size: int = field(default=32000, metadata={"help": "Vocabulary."})
    heads: int = field(default=8, metadata={"help": "Attention heads."})


NLLB_SHAPES = {
    "NLLB 600M": ModelShape(layers=12, d_model=1024, d_ff=4096, vocab_size=256206, heads=16),
    "NLLB 1.3B": ModelShape(layers=24, d_model=1024, d_ff=8192, vocab_size=256206, heads=16),
    "NLLB 3.3B": ModelShape(layers=24, d_model=2048, d_ff=8192, vocab_size=256206, heads=16),
}
_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # the ids 0 to 3 of M2M100Config


def random_masks(model: nn.Module, routes: Routes, kept: float) -> NeuronMasks:
    """Return masks that keep a random share of each block's neurons, drawn from torch's generator.

    Args:
        model: an encoder-decoder model, whose weights are not read.
        routes: the pairs, and which row each uses.
        kept: expected share of neurons that a row keeps.
    """
    blocks = find_ffn_blocks(model)
    count = {ENCODER: len(routes.encoder_rows), DECODER: len(routes.decoder_rows)}
    rows = {block.name: torch.rand(count[block.stack], block.d_ff, device="cpu") < kept for block in blocks}
    return NeuronMasks(rows, {block.name: block.stack for block in blocks}, routes)


def random_batch(model: Any, size: int, length: int) -> dict[str, torch.Tensor]:
    """Return sentences of `length` random tokens, on the model's device, that are their own translations."""
    tokens = torch.randint(4, model.config.vocab_size, (size, length), device=model.device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def numbered_words(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the special tokens of M2M100 and the words w4, w5, ... up to the size."""
    words = {word: i for i, word in enumerate([*_SPECIAL, *(f"w{i}" for i in range(4, vocab_size))])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), _SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
