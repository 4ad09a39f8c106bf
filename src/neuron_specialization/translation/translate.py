"""Translate sentences with any seq2seq model, adapted or plain."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, islice
from os import PathLike
from typing import Any

import torch
from tqdm.auto import tqdm

from ..adapter.active import active_config, known_language_tokens
from ..adapter.routing import is_routed
from ..adapter.target_tag import label_shift
from ..neurons.base_model import device_of, fixed_positions, number_of_positions, unwrap
from ..neurons.language_pairs import split_pair
from .long_sentences import LongSentences, encode_within, join_pieces
from .messages import check_positive
from .processes import this_process
from .tokenization import encode, resolve_tokens


def translate(
    model: Any,
    tokenizer: Any,
    sentences: Iterable[str],
    pair: str,
    *,
    language_tokens: Mapping[str, str] | None = None,
    source_tag: str = "source",
    batch_size: int = 32,
    long_sentences: LongSentences = "error",
    numbers: Sequence[int] | None = None,
    progress: bool | tqdm = True,
    **generate_kwargs: Any,
) -> list[str]:
    """Translate `sentences` in one direction, in batches of similar length, keeping their order.

    Args:
        model: a seq2seq model, with adapters (then run under the masks of `pair`) or without.
        tokenizer: its tokenizer.
        sentences: source sentences; any iterable of strings.
        pair: direction, such as "en-de".
        language_tokens: language code → language token. An adapter's own take precedence; codes that neither names
            must be tokens of the tokenizer themselves.
        source_tag: what the tag on the source side names, "source" or "target"; an adapter's own takes precedence.
        batch_size: sentences per batch.
        long_sentences: what to do with sentences of more tokens than the model has positions: "error", "truncate", or
            "split", which translates them in pieces and joins the translations.
        numbers: what that error calls each sentence, such as the numbers of their lines; by default 1, 2, 3, ...
        progress: show a progress bar on stderr if there are four batches or more; or the bar to advance by sentences.
        **generate_kwargs: passed to `model.generate`, for example `num_beams=5`.

    Returns:
        One translation per sentence, as the tokenizer decodes it.

    Raises:
        ValueError: if the pair is unknown to the adapter, or a language token to the tokenizer, or `sentences` holds
            something other than strings, or one is too long, or a batch has no sentence, or a search no beam.
    """
    rows = _translate_ids(
        *(model, tokenizer, sentences, pair),
        language_tokens=language_tokens,
        source_tag=source_tag,
        batch_size=batch_size,
        long_sentences=long_sentences,
        numbers=numbers,
        progress=progress,
        **generate_kwargs,
    )
    target = split_pair(pair)[1] if rows else ""
    return [join_pieces(tokenizer.batch_decode(pieces, skip_special_tokens=True), target) for pieces in rows]


def translate_tokens(
    model: Any, tokenizer: Any, sentences: Iterable[str], pair: str, **options: Any
) -> list[list[str]]:
    """Translate as `translate` does, with its options, but return tokens, the special ones left out."""
    rows = _translate_ids(model, tokenizer, sentences, pair, **options)
    return [tokenizer.convert_ids_to_tokens(sum(pieces, []), skip_special_tokens=True) for pieces in rows]


def text_of(tokenizer: Any, translations: Sequence[list[str]]) -> list[str]:
    """Return the text of translations given as tokens."""
    rows = [tokenizer.convert_tokens_to_ids(tokens) for tokens in translations]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def _translate_ids(
    model: Any,
    tokenizer: Any,
    sentences: Iterable[str],
    pair: str,
    *,
    language_tokens: Mapping[str, str] | None = None,
    source_tag: str = "source",
    batch_size: int = 32,
    long_sentences: LongSentences = "error",
    numbers: Sequence[int] | None = None,
    progress: bool | tqdm = True,
    **generate_kwargs: Any,
) -> list[list[list[int]]]:
    """Return token ids for each piece of each sentence; sentences that fit the model's positions have one piece."""
    sentences = _as_list(sentences)
    beams = generate_kwargs.get("num_beams")
    check_positive(batch_size=batch_size, num_beams=1 if beams is None else beams)
    for settings in _generation_settings(model, generate_kwargs):
        if settings.get("num_return_sequences") not in (None, 1) or settings.get("return_dict_in_generate"):
            raise ValueError("Each sentence gets one translation; for several, or scores, call model.generate.")
    config = active_config(model)
    source_tag = config.source_tag if config is not None else source_tag
    tokens = pair_tokens(model, tokenizer, pair, language_tokens, source_tag)
    if not sentences:  # after the check above: an unknown language is an error in every process that shares the work
        return []
    pieces = _encode_sources(model, tokenizer, sentences, pair, tokens, source_tag, long_sentences, numbers)
    encoded = list(chain.from_iterable(pieces))
    sentence_of = [number for number, parts in enumerate(pieces) for _ in parts]
    missing = [len(parts) for parts in pieces]  # pieces of each sentence that are not translated yet
    kwargs = dict(generate_kwargs)
    if source_tag == "source" and "decoder_input_ids" not in kwargs:
        kwargs = {**_target_tag(unwrap(model), tokenizer, pair, tokens), **kwargs}
    if is_routed(model):
        kwargs["language_pairs"] = [pair]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]), reverse=True)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    translations: list[list[int]] = [[] for _ in encoded]
    # M2M100's tokenizer does not count its tags among the special tokens, which decoding leaves out
    tags = {tokenizer.convert_tokens_to_ids(token) for token in tokens.values()}
    training = model.training
    model.eval()
    try:
        with _bar(progress, pair, sentences, hidden=len(batches) < 4) as bar:
            for batch in batches:
                rows = _generate(model, tokenizer, [encoded[i] for i in batch], kwargs)
                for i, row in zip(batch, rows, strict=True):
                    translations[i] = [token for token in row if token not in tags]
                    missing[sentence_of[i]] -= 1
                bar.update(sum(not missing[number] for number in {sentence_of[i] for i in batch}))
    finally:
        model.train(training)
    rest = iter(translations)
    return [list(islice(rest, len(parts))) for parts in pieces]


def note_composed(model: Any, pairs: Iterable[str]) -> None:
    """Say on stderr, on the main process, which pairs the adapter was not made for and composes of others' rows."""
    config = active_config(model)
    routes = config.build_routes() if config is not None else None
    composed = [p for p in pairs if routes is not None and p not in routes.language_pairs and routes.knows(p)]
    if composed and this_process().is_main_process:
        print(f"composed of the rows of other pairs (zero-shot): {', '.join(composed)}", file=sys.stderr, flush=True)


def check_long_sentences(
    model: Any,
    tokenizer: Any,
    sentences: Iterable[str],
    pair: str,
    language_tokens: Mapping[str, str] | None = None,
    source_tag: str = "source",
) -> None:
    """Raise ValueError if `translate` would refuse one of the sentences as too long."""
    config = active_config(model)
    tag = config.source_tag if config is not None else source_tag
    tokens = pair_tokens(model, tokenizer, pair, language_tokens, tag)
    _encode_sources(model, tokenizer, _as_list(sentences), pair, tokens, tag, "error", None)


def _encode_sources(
    model: Any,
    tokenizer: Any,
    sentences: list[str],
    pair: str,
    tokens: Mapping[str, str],
    source_tag: str,
    long_sentences: LongSentences,
    numbers: Sequence[int] | None,
) -> list[list[list[int]]]:
    def encode_texts(texts: Sequence[str], max_length: int | None) -> list[list[int]]:
        return encode(tokenizer, pair, texts, None, tokens, source_tag, max_length)["input_ids"]

    return encode_within(number_of_positions(model), sentences, encode_texts, pair, long_sentences, numbers)


def _bar(progress: bool | tqdm, pair: str, sentences: Sequence[str], hidden: bool) -> Any:
    if isinstance(progress, tqdm):
        return nullcontext(progress)
    disable = hidden or not progress
    return tqdm(desc=f"translating {pair}", total=len(sentences), unit=" sentences", disable=disable, leave=False)


def _as_list(sentences: Iterable[str]) -> list[str]:
    if isinstance(sentences, str):
        raise ValueError("Expected a list of sentences, got one string; pass [sentence].")
    if isinstance(sentences, PathLike) or not isinstance(sentences, Iterable):
        raise ValueError(
            f"Expected a list of sentences, got {sentences!r}. recipes/translate.py translates the lines of a file."
        )
    listed = list(sentences)
    for number, sentence in enumerate(listed):
        if not isinstance(sentence, str):
            raise ValueError(f"Expected sentences, got {sentence!r} at position {number}.")
    return listed


def _target_tag(base: Any, tokenizer: Any, pair: str, tokens: Mapping[str, str]) -> dict[str, int]:
    """Return the argument that gives `generate` the target's tag.

    It is the decoder's first input where training puts the tag there (mBART), else the first token generated (NLLB,
    M2M100, mBART-50).
    """
    tag = tokenizer.convert_tokens_to_ids(tokens[split_pair(pair)[1]])
    labels = torch.tensor(encode(tokenizer, pair, [""], [""], tokens)["labels"])
    opens = label_shift(base)(labels)[0, 0].item() == tag
    return {"decoder_start_token_id" if opens else "forced_bos_token_id": tag}


def pair_tokens(
    model: Any,
    tokenizer: Any,
    pair: str,
    language_tokens: Mapping[str, str] | None = None,
    source_tag: str = "source",
) -> dict[str, str]:
    """Return the language tokens of a pair, as `resolve_tokens` does: those that the model's adapter knows, else those
    given.

    Raises:
        ValueError: if one is no language token of the tokenizer.
    """
    known = {**(language_tokens or {}), **known_language_tokens(model, tokenizer)}
    return resolve_tokens(tokenizer, [pair], known, source_tag)


def _generate(model: Any, tokenizer: Any, rows: list[list[int]], kwargs: Mapping[str, Any]) -> list[list[int]]:
    device = device_of(model)
    inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(device)
    limit = {}  # without any limit of its own, generate stops at 20 tokens
    settings = _generation_settings(model, kwargs)
    if not any(each.get(name) for each in settings for name in ("max_length", "max_new_tokens")):
        given = kwargs.get("decoder_input_ids")
        room = (fixed_positions(model) or sys.maxsize) - (1 if given is None else given.shape[1])
        limit = {"max_new_tokens": max(1, min(2 * inputs["input_ids"].shape[1] + 32, room))}
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **limit, **kwargs
        )
    return output.tolist()


def _generation_settings(model: Any, kwargs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return everything that tells `generate` what to do."""
    configs = unwrap(model).generation_config, kwargs.get("generation_config")
    return [*(vars(config) for config in configs if config is not None), kwargs]
