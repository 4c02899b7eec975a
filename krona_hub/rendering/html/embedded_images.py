"""Pictures inside a page: shrunk, few colours, as data addresses."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from krona_hub.rendering.html.markup import Markup, text

# (pixels of the longer side, steps that are shown), the first of them whose pictures fit into a page
SIZES = ((128, 12), (96, 10), (64, 8), (48, 6))
ROOM = 90_000  # bytes for all of them
COLOURS = 128
FEW = 2  # prompts whose pictures stand side by side; of more, each is a column


def embedded(path: Path, told: str, side: int) -> Markup:
    """The picture as `<img>`, at most `side` pixels wide and high."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = BytesIO()
    image.quantize(COLOURS).save(stream, "PNG", optimize=True)
    data = b64encode(stream.getvalue()).decode()
    return Markup(
        f'<img src="data:image/png;base64,{data}" width="{image.width}" height="{image.height}" alt="{text(told)}">'
    )


def spread(steps: Sequence[int], most: int) -> list[int]:
    """The first, the last, and some between, evenly.

    >>> spread(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def samples_table(samples: Mapping[int, Sequence[Path]], prompts: Sequence[str]) -> Markup:
    """The pictures of a training over time; says so where some steps are left out."""
    if not samples:
        return Markup("")
    made = Markup("")
    for side, most in SIZES:
        made = _table(samples, prompts, side, spread(sorted(samples), most))
        if len(made) <= ROOM:
            break
    return made


def _table(samples: Mapping[int, Sequence[Path]], prompts: Sequence[str], side: int, shown: Sequence[int]) -> Markup:
    most = f"{len(shown)} of {len(samples)} steps are shown; all are in the run folder. "
    left_out = most if len(shown) < len(samples) else ""
    images = {
        step: [embedded(path, f"step {step}: {told}", side) for path, told in _told(samples[step], prompts)]
        for step in shown
    }
    layout = _strips if max(map(len, images.values())) <= FEW else _columns
    return Markup(
        f'<p class="soft">{left_out}The seeds are the same at every step. Shrunk to {side} pixels and {COLOURS} '
        f"colours.</p>{layout(images, prompts)}"
    )


def _columns(images: Mapping[int, Sequence[Markup]], prompts: Sequence[str]) -> str:
    """A row per step, a column per prompt."""
    heads = "".join(f'<th scope="col">{text(p)}</th>' for p in prompts)
    rows = "\n".join(
        f'<tr><th scope="row">{step:,}' + "".join(f"<td>{image}" for image in row) for step, row in images.items()
    )
    return (
        f'<div class="scroll"><table class="samples"><thead><tr><th scope="col">step</th>{heads}'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _strips(images: Mapping[int, Sequence[Markup]], prompts: Sequence[str]) -> str:
    """For each prompt, step after step from left to right, as many in a line as the window holds."""
    strips = []
    for place in range(max(map(len, images.values()))):
        items = "".join(f"<li>{row[place]}step {step:,}" for step, row in images.items() if place < len(row))
        told = prompts[place] if place < len(prompts) else ""
        strips.append(f'<p class="soft">{text(told)}</p><ol class="strip">{items}</ol>')
    return "\n".join(strips)


def _told(paths: Sequence[Path], prompts: Sequence[str]) -> list[tuple[Path, str]]:
    """A run that went on with other prompts has pictures without one."""
    named = [*prompts, *([""] * len(paths))]
    return list(zip(paths, named, strict=False))
