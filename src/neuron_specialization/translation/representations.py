"""Encoder states of sentences, layer by layer: pooled per sentence and kept on disk, or per token as a stream.

Only a sentence's own tokens count (see `encode_sentences`): padding is left out, and so are the language token and the
end of sentence, which are the same in all sentences of a language.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from ..neurons.base_model import number_of_positions
from .batching import pad_rows
from .checkpoints import load_checkpoint, untrained_model
from .encoders import encode_sentences, language_tag
from .processes import this_process
from .transfer import Checkpoint


def load_each(checkpoints: Sequence[Checkpoint]) -> Iterator[tuple[Checkpoint, Any, Any]]:
    """Yield each checkpoint with its model, in eval mode on this process's device, and its tokenizer."""
    for each in checkpoints:
        model, tokenizer = load_checkpoint(each.location)
        if each.is_control:
            model = untrained_model(each.location, seed=0)
        yield each, model.eval().to(this_process().device), tokenizer


def check_shapes(checkpoints: Sequence[Checkpoint]) -> None:
    """Check, from their configurations alone, that checkpoints have the same weights in the same shapes.

    Raises:
        ValueError: naming the checkpoint that differs from the first.
    """
    first: dict[str, Any] = {}
    for each in checkpoints:
        config = AutoConfig.from_pretrained(each.location)
        with torch.device("meta"):
            shapes = {name: list(p.shape) for name, p in AutoModelForSeq2SeqLM.from_config(config).named_parameters()}
        first = first or shapes
        if odd := [name for name in {**first, **shapes} if first.get(name) != shapes.get(name)]:
            raise ValueError(
                f"Expected models of one architecture, such as one before and after training, but {odd[0]} is "
                f"{first.get(odd[0], 'absent')} in {checkpoints[0].location} and {shapes.get(odd[0], 'absent')} in "
                f"{each.location}."
            )


def check_tokenizers(
    checkpoints: Sequence[Checkpoint],
    sentences: Mapping[str, Sequence[str]],
    language_tokens: Mapping[str, str],
    max_length: int,
    *,
    same: bool,
) -> None:
    """Look up every language token, and, if the tokenizers have to be the same, compare what they make of the text.

    Raises:
        ValueError: naming the checkpoint.
    """
    first: Any = None
    for each in checkpoints:
        tokenizer = AutoTokenizer.from_pretrained(each.location)
        rows = _encode(tokenizer, sentences, language_tokens, min(max_length, tokenizer.model_max_length))
        first = first or rows
        if same and rows != first:
            raise ValueError(
                f"{each.location} does not cut text into the same tokens as {checkpoints[0].location}, so that their "
                "states cannot be compared token by token. Compare sentences: --level sentences."
            )


def encode_languages(
    encoder: Any,
    tokenizer: Any,
    sentences: Mapping[str, Sequence[str]],
    language_tokens: Mapping[str, str],
    max_length: int,
) -> dict[str, list[dict[str, Any]]]:
    """Return language → rows of `encode_sentences`.

    Args:
        encoder: limits the length to its number of positions.
        tokenizer: the model's tokenizer.
        sentences: language → sentences. The first language's token stands in for languages that have none.
        language_tokens: language code → token, see `language_tag`.
        max_length: longest input in tokens.
    """
    longest = min(max_length, tokenizer.model_max_length, number_of_positions(encoder) or max_length)
    return _encode(tokenizer, sentences, language_tokens, longest)


def _encode(
    tokenizer: Any, sentences: Mapping[str, Sequence[str]], language_tokens: Mapping[str, str], max_length: int
) -> dict[str, list[dict[str, Any]]]:
    first = next(iter(sentences))
    return {
        code: encode_sentences(tokenizer, texts, language_tag(tokenizer, code, first, language_tokens), max_length)
        for code, texts in sentences.items()
    }


def pooled_states(
    encoder: Any, rows: Sequence[Mapping[str, Any]], file: str | Path, batch_size: int = 64
) -> np.ndarray:
    """Return the mean of each sentence's states, float32 [layers + 1, n, d], as a memory map of a new file.

    Layer 0 is the output of the embedding, the last one what the decoder reads, with the stack's final norm.

    Args:
        encoder: the encoder, in eval mode.
        rows: n rows of `encode_sentences`.
        file: where the states go.
        batch_size: sentences per batch.
    """
    pooled: Any = None
    order = np.argsort([len(row["input_ids"]) for row in rows], kind="stable")
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        states, content = _run(encoder, [rows[i] for i in chosen])
        if pooled is None:
            pooled = np.memmap(file, np.float32, "w+", shape=(len(states), len(rows), states[0].shape[-1]))
        kept = content[..., None].float()
        for layer, hidden in enumerate(states):
            pooled[layer, chosen] = ((hidden.float() * kept).sum(1) / kept.sum(1)).cpu().numpy()
    return pooled


def token_states(
    encoders: Sequence[Any], rows: Sequence[Mapping[str, Any]], batch_size: int = 64
) -> Iterator[list[list[torch.Tensor]]]:
    """Yield, batch after batch, the states of the sentences' own tokens: encoder → layer → float32 [tokens, d].

    Args:
        encoders: encoders of models with one tokenizer, in eval mode.
        rows: of `encode_sentences`.
        batch_size: sentences per batch.
    """
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        found = []
        for encoder in encoders:
            states, content = _run(encoder, batch)
            found.append([hidden[content.bool()].float().cpu() for hidden in states])
        yield found


def _run(encoder: Any, rows: Sequence[Mapping[str, Any]]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return states per layer [batch, length, d], and which tokens are the sentences' own [batch, length]."""
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    ids, content = (pad_rows([row[name] for row in rows], 0).to(encoder.device) for name in ("input_ids", "content"))
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(encoder.device)
    with torch.no_grad():
        output = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    # of some models, the last of the hidden states is the one before the final norm
    return [*output.hidden_states[:-1], output.last_hidden_state], content
