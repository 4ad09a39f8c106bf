"""Which share of each FFN block's neurons a language pair keeps: numbers, and a picture of a few kilobytes."""

from collections.abc import Mapping, Sequence
from html import escape

import torch

from .ffn import STACKS, in_order
from .language_pairs import Routes

PICTURE_NAME = "kept_neurons.svg"
SHOWN_PAIRS = 60
_CIVIDIS = ((0, 32, 77), (65, 77, 107), (124, 123, 120), (188, 175, 111), (255, 233, 69))  # legible to the color-blind
_SHADES = 16
_WIDTH, _HEIGHT, _TOP, _LETTER = 28, 18, 42, 7.5  # of a cell, of the headings, of a letter: pixels
_GAP = 16  # between stacks, pixels


def kept_shares(packed: Mapping[str, torch.Tensor], d_ff: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return block name → float32 [rows], the share of neurons that each row keeps.

    Args:
        packed: block name → uint8 [rows, ceil(d_ff / 8)].
        d_ff: block name → number of neurons.
    """
    bits = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8)
    return {name: bits[rows.cpu().int()].sum(1) / d_ff[name] for name, rows in packed.items()}


def draw_kept(shares: Mapping[str, torch.Tensor], stacks: Mapping[str, str], routes: Routes) -> str:
    """Return an SVG with a line per language pair (the first 60) and a column per block, the more kept the lighter.

    Args:
        shares: what `kept_shares` returns.
        stacks: block name → "encoder" or "decoder".
        routes: which row of each stack a pair uses.
    """
    pairs = routes.language_pairs[:SHOWN_PAIRS]
    columns: dict[str, list[list[float]]] = {}
    for i, stack in enumerate(STACKS):
        rows = [routes.route(pair)[i] for pair in pairs]
        blocks = in_order((name for name in shares if stacks[name] == stack), stacks)
        columns |= {stack: [shares[name][rows].tolist() for name in blocks]} if blocks else {}
    every = [share for of in columns.values() for column in of for share in column]
    low, high = min(every), max(every)
    left, bottom = 12 + _LETTER * max(map(len, pairs)), _TOP + _HEIGHT * len(pairs) + 22
    drawn = [_text(left - 6, _TOP + _HEIGHT * i + 13, pair, "end") for i, pair in enumerate(pairs)]
    drawn.append(_text(left, bottom, f"neurons kept, from {low:.0%} (dark) to {high:.0%} (light)"))
    x = left
    for stack, of in columns.items():
        drawn += _heatmap(stack, of, x, low, high)
        x += _WIDTH * len(of) + _GAP
    size = f'width="{max(x, left + 280):g}" height="{bottom + 10}" font-family="sans-serif" font-size="11"'
    background = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', background, *drawn, "</svg>\n"])


def _heatmap(stack: str, columns: Sequence[Sequence[float]], x: float, low: float, high: float) -> list[str]:
    """Return a stack's cells, a path per shade, which is far smaller than an element per cell, and their headings."""
    cells: dict[int, list[str]] = {}
    for layer, column in enumerate(columns):
        for line, share in enumerate(column):
            shade = round((_SHADES - 1) * (share - low) / ((high - low) or 1))
            cells.setdefault(shade, []).append(f"M{layer} {line}h.97")
    colors = {shade: _color(shade / (_SHADES - 1)) for shade in sorted(cells)}
    paths = [f'<path stroke="rgb{rgb}" d="' + "".join(cells[shade]) + '"/>' for shade, rgb in colors.items()]
    numbers = [_text(x + _WIDTH * (layer + 0.5), _TOP - 6, str(layer), "middle") for layer in range(len(columns))]
    place = f"translate({x:g} {_TOP + _HEIGHT / 2:g}) scale({_WIDTH} {_HEIGHT})"
    return [_text(x, 16, stack), *numbers, f'<g transform="{place}" stroke-width=".94">', *paths, "</g>"]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _color(share: float) -> tuple[int, ...]:
    place = share * (len(_CIVIDIS) - 1)
    low = min(int(place), len(_CIVIDIS) - 2)
    return tuple(round(a + (b - a) * (place - low)) for a, b in zip(_CIVIDIS[low], _CIVIDIS[low + 1], strict=True))
