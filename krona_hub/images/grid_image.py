"""A labeled grid of images, made with Pillow: a name above each column, prompt and seed beside each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

SMALLEST, LARGEST = 192, 1024  # pixels of a cell's longer side; small images are enlarged
WIDEST = 12_000  # pixels of a grid
GAP, MARGIN = 6, 10  # pixels
PAPER, INK, FAINT = "#ffffff", "#1a1a1a", "#6b6b6b"
FONTS = (
    "DejaVuSans.ttf",
    "Arial Unicode.ttf",
    "Arial.ttf",
    "NotoSansCJK-Regular.ttc",
)  # if Pillow's font lacks a character


class RowLabel(NamedTuple):
    """The label to the left of a row."""

    text: str  # the prompt; "" if the row above has the same
    below: str = ""  # "seed 3"


def labelled_grid(
    images: Sequence[Any], columns: Sequence[str], rows: Sequence[RowLabel], title: str = "", footer: str = ""
) -> Any:
    """Combine `images`, given row by row, in one labeled PIL image."""
    from PIL import Image, ImageDraw

    columns, title, footer = [_plain(label) for label in columns], _plain(title), _plain(footer)
    cell = _cell_size(images, len(columns))
    letter = max(13, min(28, cell[0] // 16))
    font, small = _font(letter, "".join((*columns, *(r.text for r in rows), title))), _font(max(12, letter * 5 // 6))
    left = _label_width(rows, cell[0]) if any(any(row) for row in rows) else 0
    heads = [_wrapped(label, font, cell[0]) for label in columns]
    line = letter * 5 // 4
    top = MARGIN + (line * 3 // 2 if title else 0) + line * max(map(len, heads)) + GAP
    wide = left + len(columns) * (cell[0] + GAP) - GAP + 2 * MARGIN
    foot = _wrapped(footer, small, wide - 2 * MARGIN) if footer else []
    high = top + len(rows) * (cell[1] + GAP) + len(foot) * line + MARGIN
    paper = Image.new("RGB", (wide, high), PAPER)
    pen = ImageDraw.Draw(paper)
    pen.text((MARGIN, MARGIN), title, INK, font)
    for number, head in enumerate(heads):
        x = MARGIN + left + number * (cell[0] + GAP)
        for up, words in enumerate(reversed(head)):
            pen.text((x + cell[0] / 2, top - GAP - line * (up + 0.5)), words, INK, font, anchor="mm")
    for number, row in enumerate(rows):
        y = top + number * (cell[1] + GAP)
        _write_row(pen, row, (font, small), (MARGIN, y), (left - MARGIN, cell[1]), line)
        for column in range(len(columns)):
            corner = (MARGIN + left + column * (cell[0] + GAP), y)
            paper.paste(_fitted(images[number * len(columns) + column], cell), corner)
    for number, words in enumerate(foot):
        pen.text((MARGIN, high - MARGIN - line * (len(foot) - number)), words, FAINT, small)
    return paper


def _cell_size(images: Sequence[Any], columns: int) -> tuple[int, int]:
    """Integer multiples for a small image, so that its pixels stay equal squares; a large one keeps its size."""
    wide, high = images[0].size
    longest = max(wide, high)
    times = -(-SMALLEST // longest) if longest < SMALLEST else min(1.0, LARGEST / longest, WIDEST / columns / wide)
    return round(wide * times), round(high * times)


def _fitted(image: Any, cell: tuple[int, int]) -> Any:
    from PIL import Image

    if image.size == cell:
        return image
    return image.convert("RGB").resize(cell, Image.Resampling.BICUBIC)


def _label_width(rows: Sequence[RowLabel], cell: int) -> int:
    """Width in pixels for the longest label in a few lines."""
    longest = max(max(len(row.text), len(row.below)) for row in rows)
    return max(80, min(int(cell * 1.1), longest * 9)) + MARGIN


def _write_row(
    pen: Any, row: RowLabel, fonts: tuple[Any, Any], corner: tuple[int, int], room: tuple[int, int], line: int
) -> None:
    """Write the prompt in as many lines as fit, and the seed below it."""
    x, y = corner
    most = max(1, room[1] // line - bool(row.below))
    lines = _wrapped(row.text, fonts[0], room[0]) if row.text else []
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][:-1].rstrip() + "…"]
    for words in lines:
        pen.text((x, y), words, INK, fonts[0])
        y += line
    pen.text((x, y), row.below, FAINT, fonts[1])


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Wrap text into lines of at most `width` pixels; a wider word is cut."""
    lines: list[str] = []
    for word in text.split() or [""]:
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while font.getlength(word) > width and len(word) > 1:
            cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:cut])
            word = word[cut:]
        lines.append(word)
    return lines


def _plain(text: str) -> str:
    """Replace the one character in labels that Pillow's font lacks."""
    return text.replace("×", "x")


def _font(size: int, text: str = "") -> Any:
    """Return Pillow's font, or a system font if the text has characters that it lacks."""
    from PIL import ImageFont

    if not text.isascii():
        for name in FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)
