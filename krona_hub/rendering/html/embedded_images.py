"""Images embedded in a report: downscaled, with few colors, as data URLs."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from krona_hub.rendering.html.markup import Markup, text

# (pixels of the longer side, steps shown); the first whose images fit is used
SIZES = ((128, 12), (96, 10), (64, 8), (48, 6))
ROOM = 90_000  # bytes for all images
COLORS = 128
FEW = 2  # prompts shown as strips of images; with more, each prompt is a column


def embedded(path: Path, alt: str, side: int) -> Markup:
    """Return an image as `<img>`, at most `side` pixels wide and high."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = BytesIO()
    image.quantize(COLORS).save(stream, "PNG", optimize=True)
    data = b64encode(stream.getvalue()).decode()
    return Markup(
        f'<img src="data:image/png;base64,{data}" width="{image.width}" height="{image.height}" alt="{text(alt)}">'
    )


def spread(steps: Sequence[int], most: int) -> list[int]:
    """Select at most `most` steps: the first, the last, and evenly spaced ones between.

    >>> spread(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def samples_table(samples: Mapping[int, Sequence[Path]], prompts: Sequence[str]) -> Markup:
    """Show the sample images of a training run over time, with a note if steps are omitted."""
    if not samples:
        return Markup("")
    html = Markup("")
    for side, most in SIZES:
        html = _table(samples, prompts, side, spread(sorted(samples), most))
        if len(html) <= ROOM:
            break
    return html


def _table(samples: Mapping[int, Sequence[Path]], prompts: Sequence[str], side: int, shown: Sequence[int]) -> Markup:
    most = f"{len(shown)} of {len(samples)} steps are shown; all are in the run folder. "
    left_out = most if len(shown) < len(samples) else ""
    images = {
        step: [embedded(path, f"step {step}: {prompt}", side) for path, prompt in _with_prompts(samples[step], prompts)]
        for step in shown
    }
    layout = _strips if max(map(len, images.values())) <= FEW else _columns
    return Markup(
        f'<p class="soft">{left_out}The seeds are the same at every step. Downscaled to {side} pixels and {COLORS} '
        f"colors.</p>{layout(images, prompts)}"
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
    """One strip per prompt, step by step from left to right, wrapped at the width of the window."""
    strips = []
    for index in range(max(map(len, images.values()))):
        items = "".join(f"<li>{row[index]}step {step:,}" for step, row in images.items() if index < len(row))
        prompt = prompts[index] if index < len(prompts) else ""
        strips.append(f'<p class="soft">{text(prompt)}</p><ol class="strip">{items}</ol>')
    return "\n".join(strips)


def _with_prompts(paths: Sequence[Path], prompts: Sequence[str]) -> list[tuple[Path, str]]:
    """Pair images with prompts; after a resume with fewer prompts, some images have none."""
    padded = [*prompts, *([""] * len(paths))]
    return list(zip(paths, padded, strict=False))
