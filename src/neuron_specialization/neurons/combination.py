"""Join or combine masks that were made for one base model, perhaps by different people."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .ffn import DECODER, ENCODER, STACKS, same_weights
from .language_pairs import Routes, shorten

if TYPE_CHECKING:
    from .masks import NeuronMasks


_OPERATIONS = {"union": torch.logical_or, "intersection": torch.logical_and}
_REMEDY = (
    "Identify one of them again without it (identify --language_pairs); masks of exactly the same pairs have a union "
    "and an intersection."
)


def check_same_base(a: "NeuronMasks", b: "NeuronMasks") -> None:
    """Check that two masks were made for one base model.

    Raises:
        ValueError: if their blocks, architectures or sampled weights differ.
    """
    if a.d_ff != b.d_ff or a.stacks != b.stacks:
        raise ValueError(
            f"These masks were made for different models: one has {len(a.d_ff)} blocks of {_widths(a)} neurons, the "
            f"other {len(b.d_ff)} of {_widths(b)}."
        )
    if a.fingerprint and b.fingerprint and a.fingerprint != b.fingerprint:
        raise ValueError(f"These masks were made for different models: {a.fingerprint} and {b.fingerprint}.")
    if not same_weights(a.weights_sample, b.weights_sample):
        names = [each.base_model_name_or_path or "not recorded" for each in (a, b)]
        raise ValueError(
            f"These masks were made for checkpoints with different weights ({' and '.join(names)}), so their neurons "
            "do not correspond."
        )


def combined(a: "NeuronMasks", b: "NeuronMasks", how: str) -> "NeuronMasks":
    """Return `NeuronMasks` of the same pairs, with the "union" or the "intersection" of both masks' rows.

    Raises:
        ValueError: if the models, the pairs, the rows that these use or their tokens differ, or a row would be empty.
    """
    check_same_base(a, b)
    if _named(a.routes) != _named(b.routes):
        raise ValueError(
            "Only masks of the same language pairs and rows have a union or intersection; got "
            f"{a.language_pairs} with {b.language_pairs}."
        )
    rows = {}
    for block, stack in a.stacks.items():
        names, others = a.routes.row_names(stack), b.routes.row_names(stack)
        rows[block] = _OPERATIONS[how](a.rows[block], b.rows[block][[others.index(name) for name in names]])
        empty = [name for name, row in zip(names, rows[block], strict=True) if not row.any()]
        if empty:
            raise ValueError(f"The {how} would keep no neuron of {', '.join(empty)} in {block}.")
    tokens = _tokens(a.language_token_ids, b.language_token_ids)
    selector = {"name": how, "of": [a.selector, b.selector]}
    return replace(a, rows=rows, selector=selector, language_token_ids=tokens, **_base(a, b))


def joined(a: "NeuronMasks", b: "NeuronMasks") -> "NeuronMasks":
    """Return `NeuronMasks` with the rows and pairs of both; see `NeuronMasks.concatenate`.

    Raises:
        ValueError: if the models or their tags differ, or a row or pair of both is not the same in both.
    """
    check_same_base(a, b)
    if a.routes.source_tag != b.routes.source_tag:
        raise ValueError(
            f"One of these masks has source_tag={a.routes.source_tag!r}, the other {b.routes.source_tag!r}."
        )
    names, places = {}, {}
    for stack in STACKS:
        first, second = (masks.routes.row_names(stack) for masks in (a, b))
        names[stack] = [*first, *(name for name in second if name not in first)]
        places[stack] = [names[stack].index(name) for name in second]
    rows = {}
    for block, stack in a.stacks.items():
        ours, others = a.rows[block], b.rows[block]
        _check_equal(ours, others, places[stack], names[stack], block)
        rows[block] = torch.ones(len(names[stack]), ours.shape[1], dtype=torch.bool)
        rows[block][: len(ours)] = ours
        rows[block][places[stack]] = others
    moved = {pair: (places[ENCODER][e], places[DECODER][d]) for pair, (e, d) in b.routes.listed.items()}
    routed_elsewhere = [pair for pair in moved if a.routes.listed.get(pair, moved[pair]) != moved[pair]]
    if routed_elsewhere:
        raise ValueError(f"Both masks hold {', '.join(routed_elsewhere)}, with different rows. {_REMEDY}")
    routes = Routes(names[ENCODER], names[DECODER], {**a.routes.listed, **moved}, a.routes.source_tag)
    selector = a.selector if a.selector == b.selector else {"name": "concatenation", "of": [a.selector, b.selector]}
    tokens = _tokens(a.language_token_ids, b.language_token_ids)
    both = replace(a, rows=rows, routes=routes, selector=selector, language_token_ids=tokens, **_base(a, b))
    _check_kept(both, a, b)
    return both


def _base(a: "NeuronMasks", b: "NeuronMasks") -> dict[str, Any]:
    """Return what is known of the base that both were made for, whichever of them knows it."""
    known = ("fingerprint", "weights_sample", "base_model_name_or_path")
    return {name: getattr(a, name) or getattr(b, name) for name in known}


def _check_kept(both: "NeuronMasks", *parts: "NeuronMasks") -> None:
    """Rows of single languages imply pairs that are not listed, which the other part may hold by name."""
    for masks, other in (parts, parts[::-1]):
        held = set(masks.language_pairs)
        changed = [
            pair
            for pair in other.routes.listed
            if pair in held
            and any(not torch.equal(both.row(pair, block), masks.row(pair, block)) for block in masks.stacks)
        ]
        if changed:
            raise ValueError(f"Both masks hold {shorten(changed)}, with different rows. {_REMEDY}")


def _check_equal(first: torch.Tensor, second: torch.Tensor, places: list[int], names: list[str], block: str) -> None:
    for row, place in zip(second, places, strict=True):
        if place < len(first) and not torch.equal(row, first[place]):
            raise ValueError(f"Both masks hold {names[place]}, and they keep different neurons in {block}. {_REMEDY}")


def _tokens(a: dict[str, int] | None, b: dict[str, int] | None) -> dict[str, int] | None:
    clashes = [code for code in a or {} if b and b.get(code, (a or {})[code]) != (a or {})[code]]
    if clashes:
        raise ValueError(f"The masks name different tokens for {', '.join(clashes)}.")
    return {**(a or {}), **(b or {})} or None


def _named(routes: Routes) -> tuple:
    """Return what the rows are for, whatever their order."""
    encoder, decoder = (routes.row_names(stack) for stack in STACKS)
    listed = {pair: (encoder[e], decoder[d]) for pair, (e, d) in routes.listed.items()}
    return set(encoder), set(decoder), listed, routes.source_tag


def _widths(masks: "NeuronMasks") -> str:
    return ", ".join(map(str, sorted(set(masks.d_ff.values()))))
