"""Block × projection: a share per module, as a table with cells colored on a fixed scale from 0 to 100 %."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite

from krona_hub.rendering.html.markup import Markup, text

CONTAINER = re.compile(r"^(.*(?:blocks|block|layers|attentions|resnets|samplers|refiner)\.\d+)\.(.+)$")


def block_and_projection(layer: str) -> tuple[str, str]:
    """Split a layer name into block and projection; a layer outside numbered blocks belongs to its component.

    >>> block_and_projection("unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q")
    ('unet.down_blocks.0.attentions.1.transformer_blocks.0', 'attn1.to_q')
    >>> block_and_projection("unet.conv_in")
    ('unet', 'conv_in')
    """
    found = CONTAINER.match(layer)
    if found:
        return found[1], found[2]
    head, _, rest = layer.partition(".")
    return (head, rest) if rest else ("", layer)


def heat_map(values: Mapping[str, float], title: str, caption: str) -> Markup:
    """Show layer -> share (0 to 1) as a table of blocks and projections for each kind of block, with values.

    A share that is NaN or infinite is labeled so; one above 1 is shown as is and colored as 1.
    """
    if not values:
        return Markup("")
    kinds: dict[str, dict[tuple[str, str], float]] = {}
    for layer, value in values.items():
        block, projection = block_and_projection(layer)
        kinds.setdefault(_kind(block), {})[block, projection] = value
    tables = "\n".join(_table(cells, f"{title}, {kind}") for kind, cells in kinds.items())
    return Markup(
        f'<p class="soft"><strong>{text(title)}.</strong> {text(caption)} In percent, on a fixed scale from 0 (no '
        f"color) to 100 (full color); an empty cell has no module.</p>{tables}"
    )


def _kind(block: str) -> str:
    """The kind of a block: blocks of one kind have the same projections.

    >>> _kind("unet.down_blocks.0.attentions.1.transformer_blocks.0"), _kind("unet")
    ('unet transformer_blocks', 'unet')
    """
    names = [name for name in block.split(".") if not name.isdigit()]
    return " ".join(dict.fromkeys((names[0], names[-1])))


def _table(cells: Mapping[tuple[str, str], float], title: str) -> str:
    blocks, projections = _ordered(b for b, _ in cells), _ordered(p for _, p in cells)
    heads = "".join(f'<th scope="col">{text(p)}' for p in projections)
    rows = "\n".join(f"<tr><th scope=row>{text(b)}" + _row([cells.get((b, p)) for p in projections]) for b in blocks)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(title)}"><table class="heat"><thead><tr>'
        f'<th scope="col">block{heads}</thead><tbody>\n{rows}</table></div>'
    )


def _ordered(names: Iterable[str]) -> list[str]:
    """Remove duplicates and sort, with numbers by value."""
    return sorted(set(names), key=lambda name: [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", name)])


def _row(shares: Sequence[float | None]) -> str:
    """The cells up to the last one with a module; HTML allows omitting the rest."""
    last = max((i for i, share in enumerate(shares) if share is not None), default=-1)
    return "".join(map(_cell, shares[: last + 1]))


def _cell(share: float | None) -> str:
    if share is None:
        return "<td>"
    if not isfinite(share):
        return "<td>NaN or infinite"
    percentage = 100 * share
    return f"<td style=--e:{min(100, round(percentage))}>{text(_digits(percentage))}"


def _digits(number: float) -> str:
    """
    >>> _digits(0), _digits(0.004), _digits(0.31), _digits(99.97), _digits(100)
    ('0', '<.1', '.3', '99.9', '100')
    """
    if 0 < number < 0.1:
        return "<.1"
    if 99.5 <= number < 100:
        return "99.9" if number > 99.9 else f"{number:.1f}"
    return f"{number:.1f}".removeprefix("0") if 0 < number < 0.95 else f"{number:.0f}"
