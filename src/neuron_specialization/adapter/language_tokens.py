"""Language tokens: how a model knows which language a row of tokens is in, and so which pair a sample is."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from ..neurons.ffn import ENCODER
from ..neurons.language_pairs import shorten, split_pair

# Tags that their tokenizers hold as ordinary entries of the vocabulary: those of MADLAD and of Marian.
_TAGS_IN_VOCABULARY = re.compile(r"<2\w+>|>>\w+<<")
_NO_TAGS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def language_token_ids(tokenizer: Any, tokens: Mapping[str, str]) -> dict[str, int]:
    """Return language code → id of its token.

    Args:
        tokenizer: the model's tokenizer.
        tokens: language code (as in the names of the pairs) → its language token, such as "deu_Latn" (NLLB),
            "__de__" (M2M100), ">>deu<<" (Marian) or "<2de>" (MADLAD).

    Raises:
        ValueError: if one is no language token (see `check_language_tokens`), or two languages share one.
    """
    ids = check_language_tokens(tokenizer, tokens)
    if len(set(ids.values())) < len(ids):
        raise ValueError(f"Two languages share one token: {dict(tokens)}. Each language needs a token of its own.")
    return ids


def check_language_tokens(tokenizer: Any, tokens: Mapping[str, str]) -> dict[str, int]:
    """Return language code → id of its token, after checking that each is a language token of the tokenizer.

    Language tokens are special or added tokens other than the usual ones, the tags that M2M100's tokenizer keeps
    outside its vocabulary, and entries of the vocabulary that look like Marian's and MADLAD's tags. Other entries are
    pieces of words: "de" is one in many vocabularies, and no model was trained to read it as a tag.

    Args:
        tokenizer: the model's tokenizer.
        tokens: language code → language token.

    Raises:
        ValueError: if one is not; the message lists those that the tokenizer has.
    """
    marked = _marked_tokens(tokenizer)
    ids = {code: _known_id(tokenizer, token) for code, token in tokens.items()}
    found = {
        code: i
        for code, i in ids.items()
        if i is not None and (tokens[code] in marked or _TAGS_IN_VOCABULARY.fullmatch(tokens[code]))
    }
    if len(found) < len(tokens):
        absent = ", ".join(f"{token!r} for {code!r}" for code, token in tokens.items() if code not in found)
        known = [*marked, *(token for token in tokenizer.get_vocab() if _TAGS_IN_VOCABULARY.fullmatch(token))]
        known.sort(key=lambda token: not any(code in token for code in tokens))  # "deu_Latn" first, for "de"
        raise ValueError(
            f"Not a language token of the tokenizer: {absent}. Expected special or added tokens, not pieces of words; "
            + (f"it has {shorten(known, 20)}. " if known else "it has none. ")
            + "Map language codes to tokens, for example language_tokens={'de': 'deu_Latn'}, on the command line "
            "--language_tokens de=deu_Latn."
        )
    return found


def _marked_tokens(tokenizer: Any) -> dict[str, None]:
    """Return the special and added tokens without the usual ones, as the keys of a dict."""
    of_m2m100 = getattr(tokenizer, "lang_token_to_id", {})
    marked = dict.fromkeys([*tokenizer.all_special_tokens, *tokenizer.get_added_vocab(), *of_m2m100])
    for name in _NO_TAGS:
        marked.pop(getattr(tokenizer, name, None), None)
    return marked


def _known_id(tokenizer: Any, token: str) -> int | None:
    found = tokenizer.convert_tokens_to_ids(token)
    return None if found is None or (found == tokenizer.unk_token_id and token != tokenizer.unk_token) else int(found)


@dataclass(frozen=True)
class TokenBatch:
    """The tokens of a call that may carry language tags.

    Attributes:
        source: token ids of the source side, int64 [samples, length], or None.
        target: of the target side: int64 [samples, length]; one id for all samples; or None.
        decoder_input: likewise, for the samples whose `target` carries no tag.
        in_cache: whether earlier target tokens, the tag among them, are in a cache instead.
    """

    source: torch.Tensor | None = None
    target: torch.Tensor | int | None = None
    decoder_input: torch.Tensor | None = None
    in_cache: bool = False

    def continuing(self, earlier: "TokenBatch") -> "TokenBatch":
        """Return the tokens of a call that continues an earlier one, from its encoder states or its cache."""
        if self.in_cache:
            return earlier
        target = earlier if self.target is None else self
        return TokenBatch(earlier.source, target.target, target.decoder_input)


def tokens_of_forward(args: tuple, kwargs: Mapping[str, Any]) -> TokenBatch:
    """Return the tokens of a model's forward call.

    Labels go before decoder inputs, which lack their last token: the tag itself, in conventions that put it there.
    Where labels leave the tag out of the loss, decoder inputs have it.
    """
    source = kwargs.get("input_ids", args[0] if args else None)
    labels, inputs = _ids(kwargs.get("labels")), _ids(kwargs.get("decoder_input_ids"))
    if labels is None:
        return TokenBatch(_ids(source), inputs, in_cache=_cached(kwargs))
    return TokenBatch(_ids(source), labels, inputs, _cached(kwargs))


def tokens_of_stack(stack: str, args: tuple, kwargs: Mapping[str, Any]) -> TokenBatch:
    """Return the tokens of an encoder or a decoder that is called by itself."""
    ids = _ids(kwargs.get("input_ids", args[0] if args else None))
    return TokenBatch(source=ids) if stack == ENCODER else TokenBatch(target=ids, in_cache=_cached(kwargs))


def _cached(kwargs: Mapping[str, Any]) -> bool:
    cache = kwargs.get("past_key_values")
    return isinstance(cache, Cache) and int(cache.get_seq_length()) > 0


def tokens_of_generate(model: Any, language_ids: set[int], args: tuple, kwargs: Mapping[str, Any]) -> TokenBatch:
    """Return the tokens of a `generate` call.

    The target's tag is the first found of `decoder_input_ids`, `forced_bos_token_id`, `decoder_start_token_id`:
    arguments first, then the generation config. Else it is that of `labels`, which Trainer passes along. A
    `forced_bos_token_id` that the caller gave counts even if it is none of `language_ids`, so that a language the
    adapter does not know is never taken for another.
    """
    source = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    target = _ids(kwargs.get("decoder_input_ids"))
    # after a start token alone, a forced one follows; after more than that, none is forced
    if target is not None and (target.shape[1] > 1 or bool(_is_any_of(target, language_ids).all())):
        return TokenBatch(_ids(source), target)
    given, own = kwargs.get("generation_config"), getattr(model, "generation_config", None)
    for name in ("forced_bos_token_id", "decoder_start_token_id"):
        chosen = kwargs.get(name, getattr(given, name, None))
        value = getattr(own, name, None) if chosen is None else chosen
        if isinstance(value, int) and (
            value in language_ids or (chosen is not None and name == "forced_bos_token_id")
        ):
            return TokenBatch(_ids(source), value)
        if isinstance(value, list | torch.Tensor) and name == "decoder_start_token_id":
            return TokenBatch(_ids(source), torch.as_tensor(value).reshape(-1, 1))
    labels = _ids(kwargs.get("labels"))
    tagged = labels is not None and bool(_is_any_of(labels, language_ids).any(1).all())
    return TokenBatch(_ids(source), labels if tagged else None)


def _is_any_of(tokens: torch.Tensor, ids: set[int]) -> torch.Tensor:
    return torch.isin(tokens, torch.tensor(sorted(ids), dtype=tokens.dtype, device=tokens.device))


def _ids(value: Any) -> torch.Tensor | None:
    is_tokens = isinstance(value, torch.Tensor) and value.ndim == 2 and not value.is_floating_point()
    return value if is_tokens else None


@dataclass(frozen=True)
class TagReader:
    """Reads languages from tokens.

    Attributes:
        ids: language code → token id.
        source_tag: what the tag on the source side names, "source" or "target".
    """

    ids: dict[str, int]
    source_tag: str

    def sides(self, batch: TokenBatch) -> tuple[list[str | None] | None, list[str | None] | None]:
        """Return the source and the target language of each sample.

        A language is None where a row has no tag, or several different ones; a whole side is None where the tokens do
        not name it.
        """
        on_source = None if batch.source is None else self.read(batch.source)
        if self.source_tag == "target":
            return None, on_source
        if isinstance(batch.target, int):
            by_id = {token: code for code, token in self.ids.items()}
            samples = 1 if batch.source is None else len(batch.source)
            return on_source, [by_id.get(batch.target)] * samples
        targets = None if batch.target is None else self.read(batch.target)
        if targets is not None and None in targets and batch.decoder_input is not None:
            fed = self.read(batch.decoder_input)
            targets = [code or other for code, other in zip(targets, fed, strict=True)]
        return on_source, targets

    def read(self, tokens: torch.Tensor) -> list[str | None]:
        """Return the one language of each sample, wherever its token is; None where there is none, or several."""
        codes = list(self.ids)
        ids = torch.tensor([self.ids[code] for code in codes], device=tokens.device)
        found = (tokens[:, :, None] == ids).any(1)
        index = torch.where(found.sum(1) == 1, found.int().argmax(1), -1)
        return [codes[i] if i >= 0 else None for i in index.tolist()]


def fitting_pairs(pairs: list[str], source: str | None, target: str | None) -> list[str]:
    """Return the pairs of which one side is known."""
    sides = [(pair, *split_pair(pair)) for pair in pairs if "-" in pair]
    return [pair for pair, s, t in sides if source in (None, s) and target in (None, t)]
