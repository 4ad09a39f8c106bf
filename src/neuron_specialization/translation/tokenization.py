"""Tokenizers: encode text with the language tags a model expects, and train a shared BPE for a new model."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import NllbTokenizer

from ..adapter.language_tokens import check_language_tokens
from ..neurons.language_pairs import split_pair

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")


def resolve_tokens(
    tokenizer: Any, language_pairs: Iterable[str], tokens: Mapping[str, str] | None = None, source_tag: str = "source"
) -> dict[str, str]:
    """Return language code → language token for every language of the pairs.

    Where the source side carries the target's tag, sources need none, and those without are left out: Marian's models
    out of one language have tags of the others only.

    Args:
        tokenizer: the model's tokenizer.
        language_pairs: names of the pairs.
        tokens: language code → token; codes that it leaves out must be tokens themselves.
        source_tag: what the tag on the source side names.

    Raises:
        ValueError: if one is no language token of the tokenizer; pieces of words are none.
    """
    tokens, pairs = tokens or {}, [split_pair(pair) for pair in language_pairs]
    resolved = {code: tokens.get(code, code) for pair in pairs for code in pair}
    if source_tag == "target":
        for code in resolved.keys() - {target for _, target in pairs} - tokens.keys():
            try:
                check_language_tokens(tokenizer, {code: code})
            except ValueError:
                del resolved[code]
    check_language_tokens(tokenizer, resolved)
    return resolved


def encode(
    tokenizer: Any,
    pair: str,
    sources: Sequence[str],
    targets: Sequence[str] | None,
    tokens: Mapping[str, str],
    source_tag: str = "source",
    max_length: int | None = None,
) -> dict[str, list]:
    """Tokenize sentences of one direction with their language tags.

    Args:
        tokenizer: one that adds tags itself (NLLB, M2M100, mBART: it has `src_lang`), or, with `source_tag="target"`,
            one that expects the target's tag before the text (Marian, MADLAD/T5).
        pair: the direction.
        sources: source sentences.
        targets: target sentences, or None.
        tokens: language code → language token.
        source_tag: what the tag on the source side names.
        max_length: truncate to this many tokens, tags included.

    Returns:
        "input_ids", and "labels" where there are targets: lists of lists of token ids.

    Raises:
        ValueError: if the tokenizer adds no tags and `source_tag` is "source".
    """
    source, target = split_pair(pair)
    options = {"truncation": max_length is not None, "max_length": max_length, "return_attention_mask": False}
    if source_tag == "target":
        sources = [f"{tokens[target]} {sentence}" for sentence in sources]
        return _tokenize(tokenizer, sources, targets, options)
    with language_tags(tokenizer, tokens[source], tokens[target]):
        return _tokenize(tokenizer, sources, targets, options)


def _tokenize(
    tokenizer: Any, sources: Sequence[str], targets: Sequence[str] | None, options: dict[str, Any]
) -> dict[str, list]:
    options = {**options, "verbose": False}  # no warning of the tokenizer's own limit: callers know the model's
    encoded = {"input_ids": tokenizer(list(sources), **options)["input_ids"]}
    if targets is not None:
        encoded["labels"] = tokenizer(text_target=list(targets), **options)["input_ids"]
    return encoded


@contextmanager
def language_tags(tokenizer: Any, source: str, target: str) -> Iterator[None]:
    """Set the language tokens that a tokenizer adds to sources and targets, then restore the previous ones.

    Raises:
        ValueError: if the tokenizer adds none.
    """
    if not hasattr(tokenizer, "src_lang"):
        raise ValueError(
            f"A {type(tokenizer).__name__} adds no language tags (it has no src_lang). If the model expects the "
            "target's tag before the source, as Marian and MADLAD do, pass source_tag='target'."
        )
    # M2M100's names of languages are not their tokens: "de" has "__de__"
    names = {token: name for name, token in getattr(tokenizer, "lang_code_to_token", {}).items()}
    before = tokenizer.src_lang, tokenizer.tgt_lang
    try:
        tokenizer.src_lang, tokenizer.tgt_lang = names.get(source, source), names.get(target, target)
        yield
    finally:
        tokenizer.src_lang, tokenizer.tgt_lang = before


def train_tokenizer(
    sentences: Iterable[str],
    language_tokens: Sequence[str],
    vocab_size: int,
    max_length: int = 128,
    mask_token: str | None = None,
) -> NllbTokenizer:
    """Train one BPE for all languages and wrap it as an NLLB-style tokenizer.

    The source's tag opens the encoder's input, the target's tag opens the labels. `AutoTokenizer` reloads what
    `save_pretrained` writes.

    Args:
        sentences: text of all languages.
        language_tokens: tags, such as ["eng_Latn", "deu_Latn"].
        vocab_size: number of entries, special tokens and tags included.
        max_length: the model's longest input in tokens.
        mask_token: what stands for masked text in denoising, such as "<mask>"; by default there is none.

    Raises:
        ValueError: if a tag or the mask token occurs in the text: the tokenizer would then cut words at it.
    """
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    bpe.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    reserved = [*([mask_token] if mask_token else []), *language_tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL_TOKENS, *reserved], show_progress=False
    )
    bpe.train_from_iterator(_without_tokens(sentences, reserved), trainer)
    model = json.loads(bpe.to_str())["model"]
    merges: Any = [tuple(merge) for merge in model["merges"]]
    return NllbTokenizer(
        vocab=model["vocab"],
        merges=merges,
        mask_token=mask_token or "<unk>",  # the default would be a token outside the vocabulary
        extra_special_tokens=list(language_tokens),
        src_lang=language_tokens[0],
        tgt_lang=language_tokens[-1],
        model_max_length=max_length,
    )


def _without_tokens(sentences: Iterable[str], reserved: Sequence[str]) -> Iterator[str]:
    tokens = re.compile("|".join(map(re.escape, reserved)))
    for sentence in sentences:
        if found := tokens.search(sentence):
            raise ValueError(
                f"The token {found.group()!r} occurs in the text ({sentence!r}), where the tokenizer would "
                "cut words at it. Use tokens that no text contains, such as 'deu_Latn'."
            )
        yield sentence
