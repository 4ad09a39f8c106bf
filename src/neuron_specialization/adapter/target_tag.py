"""The target's language tag in `generate`: set by itself where the pair is chosen and the adapter knows its tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..neurons.base_model import device_of
from ..neurons.language_pairs import split_pair
from ..neurons.positions import IGNORED
from .call import Call
from .language_tokens import TagReader, fitting_pairs
from .pair_resolver import PairResolver


def target_arguments(
    model: Any, call: Call, resolvers: Sequence[PairResolver], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments that make `generate` translate into the languages of the call's pairs.

    Nothing is set where the caller says how the target begins (`decoder_input_ids`, `forced_bos_token_id`, or a
    language token as `decoder_start_token_id`), where the source carries the target's tag, or where the adapter does
    not know the language's token.

    Args:
        model: the base model.
        call: the call, with its pairs.
        resolvers: those of the adapters that run.
        kwargs: the caller's arguments, which take precedence.

    Raises:
        ValueError: if the tag of a source contradicts the pair that was chosen, or only some samples have a tag.
    """
    resolver = next((r for r in resolvers if r.reader is not None), None)
    if resolver is None or resolver.reader is None:
        return {}
    reader = resolver.reader
    begins = _says_how_to_begin(kwargs, reader)
    pairs = _names(resolver, call) or ([] if begins else _only_pairs(model, resolver, reader, call))
    if not pairs:
        return {}
    if call.pairs is not None and call.tokens.source is not None:
        _check_source_tags(reader, call.tokens.source, pairs)
    # none for the base, and for pairs without language codes
    tags = [reader.ids.get(split_pair(pair)[1]) if "-" in pair else None for pair in pairs]
    known = [tag for tag in tags if tag is not None]
    if reader.source_tag == "target" or not known or begins:
        return {}
    if len(known) < len(tags):
        without = sorted({pair for pair, tag in zip(pairs, tags, strict=True) if tag is None})
        raise ValueError(
            f"The adapter knows the target's language token of some samples of the batch, but none for {without}. "
            "Pass decoder_input_ids with what each sample begins with, or generate those apart."
        )
    opens = tag_opens_decoder(model, reader, call.tokens.source)
    if len(set(tags)) == 1:
        return {"decoder_start_token_id" if opens else "forced_bos_token_id": tags[0]}
    first = [[tag] if opens else [_start_token(model, kwargs), tag] for tag in tags]
    return {"decoder_input_ids": torch.tensor(first, device=device_of(model))}


def _start_token(model: Any, kwargs: Mapping[str, Any]) -> int:
    """Return the first token of the decoder's input: by the arguments, their generation config, the model's own."""
    name, configs = "decoder_start_token_id", (kwargs.get("generation_config"), model.generation_config)
    settings = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((token for token in settings if token is not None), model.generation_config.bos_token_id)


def tag_opens_decoder(model: Any, reader: TagReader, source: torch.Tensor | None) -> bool:
    """Whether the target's tag is the decoder's first input (mBART) instead of the first token it generates.

    It is where the tag ends a sentence, on both sides, and the model moves the last label to the front.
    """
    tag, word = next(iter(reader.ids.values())), -1
    leads = source is None
    if source is not None:
        words = source[0][source[0] != model.config.pad_token_id].cpu()  # padding may be on the left
        leads = bool(torch.isin(words[:1], torch.tensor(list(reader.ids.values()))).any())
    labels = torch.tensor([[tag, word, word] if leads else [word, word, tag]])
    return int(label_shift(model)(labels)[0, 0]) == tag


def label_shift(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from labels to decoder inputs (int64 [batch, length]): the model's own, or the usual one.

    Models such as mBART move the last token to the front; those without a method of their own (NLLB, M2M100) start
    with `decoder_start_token_id`.
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return own
    start, pad = model.config.decoder_start_token_id, model.config.pad_token_id

    def shift_right(labels: torch.Tensor) -> torch.Tensor:
        shifted = labels.new_full(labels.shape, start)
        shifted[:, 1:] = labels[:, :-1]
        return shifted.masked_fill(shifted == IGNORED, pad)

    return shift_right


def _names(resolver: PairResolver, call: Call) -> list[str]:
    """Return the names of the call's pairs, or the adapter's only one; [] where tokens decide or the base runs."""
    if call.pairs is None:
        return resolver.pairs if len(resolver.pairs) == 1 else []
    if not isinstance(call.pairs, torch.Tensor):
        return call.pairs
    ids = call.pairs.tolist()
    return [] if min(ids) < 0 or max(ids) >= len(resolver.pairs) else [resolver.pairs[i] for i in ids]


def _only_pairs(model: Any, resolver: PairResolver, reader: TagReader, call: Call) -> list[str]:
    """Return the pair of each sample if tokens decide, and its languages (the target's by labels, if there are any)
    have one pair only, else [].

    A target that the model's own generation config forces goes before.
    """
    forced = getattr(model.generation_config, "forced_bos_token_id", None)
    if call.pairs is not None or call.tokens.source is None or forced is not None or reader.source_tag == "target":
        return []
    sources, targets = reader.sides(call.tokens)
    sides = list(zip(sources or [], targets or [None] * len(sources or []), strict=True))
    fits = {side: fitting_pairs(resolver.pairs, *side) if side[0] is not None else [] for side in set(sides)}
    return [fits[side][0] for side in sides] if all(len(pairs) == 1 for pairs in fits.values()) else []


def _check_source_tags(reader: TagReader, source: torch.Tensor, pairs: list[str]) -> None:
    side = 0 if reader.source_tag == "source" else 1
    for sample, code in enumerate(reader.read(source)):
        pair = pairs[sample * len(pairs) // len(source)]
        if code is not None and "-" in pair and code != split_pair(pair)[side]:
            raise ValueError(
                f"Sample {sample} of the batch carries the language token of {code!r} ({reader.ids[code]}), but the "
                f"language pair chosen for it is {pair!r}. Encode it with the tag of {split_pair(pair)[side]!r} (most "
                "tokenizers: tokenizer.src_lang = ...), or choose another pair."
            )


def _says_how_to_begin(kwargs: Mapping[str, Any], reader: TagReader) -> bool:
    """Whether the caller says how the target begins. Every generation config has some `decoder_start_token_id`."""
    if kwargs.get("decoder_input_ids") is not None:
        return True
    config = kwargs.get("generation_config")
    start, forced = (
        kwargs.get(name, getattr(config, name, None)) for name in ("decoder_start_token_id", "forced_bos_token_id")
    )
    return forced is not None or start in reader.ids.values() or isinstance(start, list | torch.Tensor)
