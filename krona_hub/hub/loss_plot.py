"""Loss curve of a training run for the card: a PNG made with Pillow, with equal bytes for equal metrics."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from math import isfinite
from typing import Any

from krona_hub.rendering.html.charts import Axis, AxisScale, Line, Point, short, thinned
from krona_hub.training.progress.metrics import series

WIDTH, HEIGHT = 760, 320  # pixels
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 40, 44  # margins around the plot
SUPERSAMPLING = 3  # rendered this many times larger, then shrunk: Pillow does not antialias lines
POINTS = 150  # per curve
PAPER, INK, FAINT, GRID = "#ffffff", "#1a1a1a", "#6b6b6b", "#e4e4e4"
COLORS = ("#a8c4e6", "#1f5fae", "#d1660f")


def loss_curve(rows: list[dict[str, Any]]) -> bytes | None:
    """Plot the metrics of a run; None if there are too few for a curve."""
    measured = [
        [p for p in series(rows, name) if isfinite(p[1])] for name in ("loss", "smooth_loss", "validation_loss")
    ]
    names = ("each step", "smoothed", "validation")
    lines = [Line(n, thinned(p, POINTS), c) for c, (n, p) in enumerate(zip(names, measured, strict=True)) if len(p) > 1]
    if not lines:
        return None
    from PIL import Image

    paper = Image.new("RGB", (WIDTH * SUPERSAMPLING, HEIGHT * SUPERSAMPLING), PAPER)
    _plot(paper, lines)
    stream = BytesIO()
    shrunk = paper.resize((WIDTH, HEIGHT), Image.Resampling.BOX)
    shrunk.quantize(64).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _plot(paper: Any, lines: Sequence[Line]) -> None:
    from PIL import ImageDraw

    pen = ImageDraw.Draw(paper)
    points = [p for line in lines for p in line.points]
    across = AxisScale.of([x for x, _ in points], Axis("step"), LEFT, WIDTH - RIGHT)
    down = AxisScale.of([y for _, y in points], Axis("loss", lowest=0.0), HEIGHT - BOTTOM, TOP)
    _plot_axes(pen, across, down)
    for line in lines:
        at = [(across(x) * SUPERSAMPLING, down(y) * SUPERSAMPLING) for x, y in line.points]
        pen.line(at, COLORS[line.color], (1 + (line.color > 0)) * SUPERSAMPLING, joint="curve")
    _plot_legend(pen, lines)


def _plot_axes(pen: Any, across: AxisScale, down: AxisScale) -> None:
    font = _font(12)
    for value in across.ticks():
        _stroke(pen, [(across(value), TOP), (across(value), HEIGHT - BOTTOM)])
        _write(pen, (across(value), HEIGHT - BOTTOM + 6), short(value), font, "ma")
    for value in down.ticks():
        _stroke(pen, [(LEFT, down(value)), (WIDTH - RIGHT, down(value))])
        _write(pen, (LEFT - 8, down(value)), short(value), font, "rm")
    _write(pen, ((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6), "step", font, "md")
    _write(pen, (LEFT - 8, TOP - 12), "loss", font, "rd")


def _plot_legend(pen: Any, lines: Sequence[Line]) -> None:
    """Name the curves, with the first and the last value of each."""
    font, x = _font(13), float(LEFT)
    for line in lines:
        (_, first), (_, last) = line.points[0], line.points[-1]
        label = f"{line.name}: {first:.3g} to {last:.3g}"
        _stroke(pen, [(x, TOP - 20), (x + 22, TOP - 20)], COLORS[line.color], 3)
        _write(pen, (x + 28, TOP - 20), label, font, "lm", INK)
        x += 28 + font.getlength(label) / SUPERSAMPLING + 24


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size * SUPERSAMPLING)


def _stroke(pen: Any, points: Sequence[Point], color: str = GRID, width: int = 1) -> None:
    pen.line([(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points], color, width * SUPERSAMPLING)


def _write(pen: Any, position: Point, label: str, font: Any, anchor: str, color: str = FAINT) -> None:
    pen.text((position[0] * SUPERSAMPLING, position[1] * SUPERSAMPLING), label, color, font, anchor=anchor)
