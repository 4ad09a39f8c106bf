"""Encoders of seq2seq models: loading them, encoding labeled text for them, and the states that heads read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig

from ..adapter.language_tokens import check_language_tokens
from ..neurons.adapter_file import CONFIG_NAME
from ..neurons.positions import IGNORED
from .checkpoints import load_checkpoint, untrained_model
from .processes import this_process
from .tokenization import language_tags
from .understanding import Examples

_CACHED_TOGETHER = 64  # texts whose states are computed in one batch


def check_has_encoder(location: str) -> None:
    """Refuse a checkpoint without encoder, before anything of it but its configuration is loaded.

    Raises:
        ValueError: if there is no configuration, or it describes a model that is not an encoder-decoder.
    """
    if Path(location).is_dir() and not (Path(location) / "config.json").is_file():
        if (Path(location) / CONFIG_NAME).is_file():
            raise ValueError(
                f"{location} is an adapter, under which each language has an encoder of its own. Expected a whole "
                "checkpoint, such as recipes/export.py makes of one pair."
            )
        load_checkpoint(location)  # says what the directory is instead
    try:
        config = AutoConfig.from_pretrained(location)
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot load {location!r}: expected a checkpoint directory or Hub id ({error}).") from error
    if not config.is_encoder_decoder:
        raise ValueError(
            f"{location} is a {config.model_type} checkpoint, which has no encoder beside a decoder. Expected an "
            "encoder-decoder model, such as M2M100, NLLB, mBART or T5."
        )


def load_encoder(location: str) -> Any:
    """Return the encoder of a seq2seq checkpoint, as float32 in eval mode on this process's device."""
    return load_checkpoint(location, "float32")[0].get_encoder().eval().to(this_process().device)


def random_encoder(location: str, seed: int) -> Any:
    """Return an untrained encoder with the architecture of a checkpoint, its weights drawn from `seed`."""
    model = untrained_model(location, seed)
    return model.get_encoder().float().eval().to(this_process().device)


def language_tag(tokenizer: Any, language: str, source: str, tokens: Mapping[str, str]) -> str | None:
    """Return the language token that text of a language is encoded with, or None if the tokenizer adds none.

    Args:
        tokenizer: the model's tokenizer.
        language: language code.
        source: the language that heads are trained on. Its token stands in for languages that have none.
        tokens: language code → token, or several separated by commas, of which the tokenizer must have one.

    Raises:
        ValueError: if the tokenizer has none of the tokens named for the language, or none for the source language.
    """
    if not hasattr(tokenizer, "src_lang"):
        return None
    for token in tokens.get(language, language).split(","):
        try:
            check_language_tokens(tokenizer, {language: token})
        except ValueError:
            continue
        return token
    if language in tokens or language == source:
        check_language_tokens(tokenizer, {language: tokens.get(language, language)})
    return language_tag(tokenizer, source, source, tokens)


def subwords(tokenizer: Any, examples: Examples, tagging: bool) -> list[list[list[int]]]:
    """Return token ids without special ones: per example, per text or (tagging) per word.

    Words are tokenized one by one. One of which the tokenizer makes no token becomes its unknown token.
    """
    unique = list(dict.fromkeys(text for texts in examples.texts for text in texts))
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    ids = dict(zip(unique, tokenizer(unique, **options)["input_ids"], strict=True))
    empty = [tokenizer.unk_token_id] if tagging else []
    return [[ids[text] or empty for text in texts] for texts in examples.texts]


def encode_examples(
    tokenizer: Any, examples: Examples, tagging: bool, tag: str | None, max_length: int = 128
) -> list[dict[str, Any]]:
    """Tokenize labeled text for an encoder.

    Args:
        tokenizer: the model's tokenizer.
        examples: n examples in one language.
        tagging: whether labels are of words.
        tag: language token, see `language_tag`.
        max_length: longest input in tokens. Two texts are joined by the end-of-sentence token.

    Returns:
        n rows: "input_ids"; "labels", -100 for words beyond the longest input; and for tagging "positions", of the
        first subword of each word.
    """
    before, after = _surroundings(tokenizer, tag)
    room = _room(max_length, len(before) + len(after))
    rows = []
    for parts, labels in zip(subwords(tokenizer, examples, tagging), examples.labels, strict=True):
        if not tagging and len(parts) > 1:
            parts = [parts[0], [tokenizer.eos_token_id], *parts[1:]]
        starts = np.cumsum([0, *map(len, parts)])[:-1]
        ids = [i for part in parts for i in part][:room]
        row: dict[str, Any] = {"input_ids": [*before, *ids, *after], "labels": labels}
        if tagging:
            fits = starts < room
            row["labels"] = np.where(fits, labels, IGNORED).tolist()
            row["positions"] = np.where(fits, starts + len(before), 0).tolist()
        rows.append(row)
    return rows


def encode_sentences(
    tokenizer: Any, sentences: Sequence[str], tag: str | None, max_length: int = 128
) -> list[dict[str, Any]]:
    """Tokenize sentences for an encoder, and tell their own tokens from those around them.

    Args:
        tokenizer: the model's tokenizer.
        sentences: n sentences in one language.
        tag: language token, see `language_tag`.
        max_length: longest input in tokens.

    Returns:
        n rows: "input_ids"; "content", 1 for a token of the sentence and 0 for the language token, the end of sentence
        and what else the tokenizer puts around it. Text that it makes no token of becomes its unknown token.
    """
    before, after = _surroundings(tokenizer, tag)
    room = _room(max_length, len(before) + len(after))
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    rows = []
    for ids in tokenizer(list(sentences), **options)["input_ids"]:
        ids = (ids or [tokenizer.unk_token_id])[:room]
        content = [0] * len(before) + [1] * len(ids) + [0] * len(after)
        rows.append({"input_ids": [*before, *ids, *after], "content": content})
    return rows


def _room(max_length: int, around: int) -> int:
    if max_length <= around:
        raise ValueError(f"max_length is {max_length}, and the tokens around a text are {around}: none of it is left.")
    return max_length - around


def _surroundings(tokenizer: Any, tag: str | None) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and after a text: language token, end of sentence, ..."""
    text = "a"
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tag is None:
        whole = tokenizer(text)["input_ids"]
    else:
        with language_tags(tokenizer, tag, tag):
            whole = tokenizer(text)["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad rows of `encode_examples`, or rows with "labels" and cached "states", into a batch."""

    def pad(name: str, value: int) -> torch.Tensor:
        return pad_sequence([torch.as_tensor(row[name]) for row in rows], batch_first=True, padding_value=value)

    batch = {"labels": pad("labels", IGNORED)}
    if "states" in rows[0]:
        return {**batch, "states": pad("states", 0)}
    # the attention mask hides what pads input_ids, so any id serves
    batch |= {"input_ids": pad("input_ids", 0)}
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    if "positions" in rows[0]:
        batch["positions"] = pad("positions", 0)
    return batch


def unit_states(
    encoder: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    positions: torch.Tensor | None = None,
    pooling: str = "mean",
) -> torch.Tensor:
    """Return the states that a head reads: [batch, units, d_model], one unit per text, or per word when tagging.

    Args:
        encoder: the encoder.
        input_ids: int64 [batch, length].
        attention_mask: int64 [batch, length]; padding takes no part.
        positions: first subword of each word, int64 [batch, words]; None for classification.
        pooling: how a text's states become one, "mean" or "sum".
    """
    hidden = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    if positions is not None:
        return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
    kept = attention_mask[..., None].to(hidden.dtype)
    total = (hidden * kept).sum(1, keepdim=True)
    return total if pooling == "sum" else total / kept.sum(1, keepdim=True)


def cache_states(encoder: Any, rows: Sequence[Mapping[str, Any]], pooling: str) -> list[dict[str, Any]]:
    """Return rows with "states" [units, d_model] on the CPU instead of tokens, computed once for all heads."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    cached: dict[int, dict[str, Any]] = {}
    for start in range(0, len(order), _CACHED_TOGETHER):
        chosen = order[start : start + _CACHED_TOGETHER]
        batch = {k: v.to(encoder.device) for k, v in collate([rows[i] for i in chosen]).items() if k != "labels"}
        with torch.no_grad():
            states = unit_states(encoder, **batch, pooling=pooling).float().cpu()
        for i, found in zip(chosen, states, strict=True):
            labels = rows[i]["labels"]
            cached[i] = {"labels": labels, "states": found[: len(labels)].clone()}
    return [cached[i] for i in range(len(rows))]
