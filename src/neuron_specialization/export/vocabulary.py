"""Cut a vocabulary down to the tokens that a pair's text uses: most of a large multilingual model is vocabulary."""

import copy
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from ..adapter.language_tokens import check_language_tokens
from ..neurons.ffn import STACKS

_TOKEN_IDS = (
    *(f"{name}_token_id" for name in ("pad", "bos", "eos", "decoder_start", "forced_bos", "forced_eos")),
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
)


@dataclass
class VocabularyCut:
    """What was cut.

    Attributes:
        before: entries before.
        after: entries after.
        ids: old ids of the kept entries in their new order, int64 [after].
    """

    before: int
    after: int
    ids: torch.Tensor


def trim_vocabulary(
    model: Any, tokenizer: Any, sentences: Iterable[str], language_tokens: Sequence[str]
) -> tuple[Any, Any, VocabularyCut]:
    """Return copies of a plain model and its tokenizer that know only the tokens of some text.

    Kept are the tokens of `sentences`, the given language tokens, all special tokens except the tags of other
    languages, and what the tokenizer needs to build the kept ones (merges) or to fall back to (single characters and
    bytes). Embeddings and LM head are cut in the same way.

    Args:
        model: a plain transformers model, such as `ns.compact` returns.
        tokenizer: its tokenizer, backed by the `tokenizers` library (BPE or Unigram).
        sentences: text of both languages.
        language_tokens: tags of the pair; those of other languages are dropped.

    Raises:
        ValueError: if the tokenizer is of another kind, a tag is no language token of it, there is no text, or the
            trimmed tokenizer would tokenize the text differently.
    """
    check_trimmable(tokenizer)
    tags = _tags(tokenizer)
    if tags:  # else the pair may be told otherwise, and any token kept for it
        check_language_tokens(tokenizer, {token: token for token in language_tokens})
    text = list(dict.fromkeys(sentences))
    if not text or not language_tokens:
        raise ValueError("Trimming a vocabulary takes text and language tokens to keep; one of the two is empty.")
    used = {token for tokens in _cut(tokenizer, text) for token in tokens}
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        path = Path(directory) / "tokenizer.json"
        written = json.loads(path.read_text(encoding="utf-8")) | {"truncation": None, "padding": None}
        kept = _rewrite(written, used, set(language_tokens), set(tags))
        path.write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")
        _drop_tags(Path(directory) / "tokenizer_config.json", kept, language_tokens[0])
        trimmed = AutoTokenizer.from_pretrained(directory)
    ids = _old_ids(tokenizer, trimmed)
    _check(tokenizer, trimmed, ids, text)
    cut = VocabularyCut(model.get_input_embeddings().weight.shape[0], len(ids), ids)
    return _cut_embeddings(copy.deepcopy(model), ids), trimmed, cut


def check_trimmable(tokenizer: Any) -> None:
    """Raise ValueError unless `trim_vocabulary` knows this kind of tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or json.loads(backend.to_str())["model"]["type"] not in ("BPE", "Unigram"):
        raise ValueError(
            "Only BPE and Unigram tokenizers backed by the tokenizers library (those of NLLB, mBART, T5) can be "
            f"trimmed, not a {type(tokenizer).__name__} (M2M100's and Marian's are of another kind)."
        )


def unknown_rate(tokenizer: Any, trimmed: Any, sentences: Sequence[str]) -> float:
    """Return the share of a text's tokens that the trimmed tokenizer does not produce."""
    total, unknown = 0, 0
    for before, after in zip(_cut(tokenizer, sentences), _cut(trimmed, sentences), strict=True):
        known = set(after)
        total += len(before)
        unknown += sum(token not in known for token in before)
    return unknown / max(total, 1)


def _cut(tokenizer: Any, sentences: Sequence[str]) -> Iterator[list[str]]:
    """Yield each sentence's tokens, all of them: tokenizers remember the truncation of the call before."""
    for start in range(0, len(sentences), 1000):
        batch = sentences[start : start + 1000]
        rows = tokenizer(batch, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        yield from map(tokenizer.convert_ids_to_tokens, rows)


def _tags(tokenizer: Any) -> list[str]:
    """Return the special tokens that are language tags: those without a usual role."""
    usual = {value for value in tokenizer.special_tokens_map.values() if isinstance(value, str)}
    return [token for token in tokenizer.all_special_tokens if token not in usual]


def _rewrite(written: dict[str, Any], used: set[str], wanted_tags: set[str], tags: set[str]) -> set[str]:
    """Cut the vocabulary of a serialized tokenizer, in place; return the tokens that stay."""
    model = written["model"]
    vocabulary = (
        model["vocab"] if isinstance(model["vocab"], dict) else {t: i for i, (t, _) in enumerate(model["vocab"])}
    )
    added = [entry for entry in written["added_tokens"] if entry["content"] not in tags - wanted_tags]
    # BPE may mark the place in a word: "d</w>" ends one, "##d" goes on with one
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    characters = {t for t in vocabulary if len(t) == 1 or len(t.removeprefix(prefix).removesuffix(suffix)) == 1}
    kept = characters | {token for token in vocabulary if token.startswith("<0x")}
    kept |= (used | {entry["content"] for entry in added} | wanted_tags | {str(model.get("unk_token"))}) - (
        tags - wanted_tags
    )
    if model["type"] == "Unigram":  # classes that build one count on the places of <unk> and of what is before it
        kept |= {token for token, _ in model["vocab"][: (model["unk_id"] or 0) + 1]}
    if model["type"] == "BPE":
        merges = [(left, right, left + right.removeprefix(prefix)) for left, right in model["merges"]]
        kept |= _parts(merges, kept)
        model["merges"] = [[left, right] for left, right, whole in merges if {left, right, whole} <= kept]
    ordered = [token for token in sorted(vocabulary, key=vocabulary.__getitem__) if token in kept]
    ids = {token: i for i, token in enumerate(ordered)}
    for entry in added:
        entry["id"] = ids.setdefault(entry["content"], len(ids))
    if isinstance(model["vocab"], dict):
        model["vocab"] = ids
    else:
        unknown = model["vocab"][model["unk_id"]][0] if model["unk_id"] is not None else None
        model["vocab"] = [entry for entry in model["vocab"] if entry[0] in kept]
        model["unk_id"] = ids.get(unknown)
    written["added_tokens"] = added
    written["post_processor"] = None  # rebuilt with the new ids when a language is set
    return set(ids)


def _parts(merges: list[tuple[str, str, str]], kept: set[str]) -> set[str]:
    """Return every token that a kept one can be merged from (left, right, whole), however deep.

    Tokenizers converted from sentencepiece have several merges for one token, and which of them applies depends on the
    merges before: all must be kept for the text to be tokenized the same.
    """
    halves: dict[str, set[str]] = {}
    for left, right, whole in merges:
        halves.setdefault(whole, set()).update((left, right))
    found: set[str] = set()
    stack = [token for token in kept if token in halves]
    while stack:
        for part in halves.get(stack.pop(), ()):
            if part not in found:
                found.add(part)
                stack.append(part)
    return found


def _drop_tags(path: Path, kept: set[str], language_token: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(config.get(name), list):
            config[name] = [token for token in config[name] if token in kept]
    for name in ("src_lang", "tgt_lang"):
        if config.get(name) not in (None, *kept):
            config[name] = language_token
    config.pop("added_tokens_decoder", None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def _old_ids(tokenizer: Any, trimmed: Any) -> torch.Tensor:
    old, new = tokenizer.get_vocab(), trimmed.get_vocab()
    unknown = sorted(set(new) - set(old))
    if unknown:
        raise ValueError(f"The trimmed tokenizer has tokens that the model does not know: {', '.join(unknown[:5])}.")
    # the content of a row that no token has, such as a second <unk>, does not matter
    ids = torch.full((max(new.values()) + 1,), old[tokenizer.unk_token])
    for token, i in new.items():
        ids[i] = old[token]
    return ids


def _check(tokenizer: Any, trimmed: Any, ids: torch.Tensor, text: Sequence[str]) -> None:
    for sentence, before, after in zip(text, _cut(tokenizer, text), _cut(trimmed, text), strict=True):
        if before != after:
            raise ValueError(
                f"The trimmed tokenizer would cut {sentence!r} into {after} instead of {before}. Leave the sentence "
                "out if it is unusual, for example if it contains another language's tag."
            )
    whole, again = (t(text[:1], truncation=False)["input_ids"][0] for t in (tokenizer, trimmed))
    if ids[again].tolist() != whole and getattr(tokenizer, "src_lang", None) == getattr(trimmed, "src_lang", None):
        raise ValueError("The trimmed tokenizer would put other special tokens around a sentence.")


def _cut_embeddings(model: Any, ids: torch.Tensor) -> Any:
    """Keep the rows `ids` of all token embeddings, the LM head and its bias, in place; tied weights stay tied."""
    size = model.get_input_embeddings().weight.shape[0]
    for name, buffer in list(model.named_buffers()):
        if buffer.shape == (1, size):  # final_logits_bias of the BART family
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, buffer[:, ids])
    owners = (model, model.get_encoder(), model.get_decoder())
    tables = {id(owner.get_input_embeddings().weight) for owner in owners} | {id(model.get_output_embeddings().weight)}
    cut: dict[int, nn.Parameter] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is None or id(weight) not in tables:
            continue
        if id(weight) not in cut:
            cut[id(weight)] = nn.Parameter(weight.detach()[ids].clone(), requires_grad=weight.requires_grad)
        module.weight = cut[id(weight)]
        if isinstance(module, nn.Embedding):
            module.num_embeddings = len(ids)
            if module.padding_idx is not None:
                module.padding_idx = ids.tolist().index(module.padding_idx)
        else:
            module.out_features = len(ids)
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.detach()[ids].clone())
    new = {old: i for i, old in enumerate(ids.tolist())}
    stacks = [getattr(model.config, stack, None) for stack in STACKS]
    for config in (model.config, *stacks, model.generation_config):
        if getattr(config, "vocab_size", None) is not None:
            config.vocab_size = len(ids)
        for name in _TOKEN_IDS:
            if getattr(config, name, None) is not None:
                setattr(config, name, _renumber(getattr(config, name), new))
    return model


def _renumber(ids: Any, new: dict[int, int]) -> Any:
    """Return the new id of a token, or those of a list of tokens or token sequences that are left."""
    if not isinstance(ids, list):
        return new.get(ids)
    if ids and isinstance(ids[0], list):
        return [[new[i] for i in sequence] for sequence in ids if all(i in new for i in sequence)]
    return [new[i] for i in ids if i in new]
