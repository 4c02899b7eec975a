"""Charts as hand-written SVG: lines over two axes, and bars. Colors come from the page, so dark mode works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from math import ceil, floor, isfinite, log10

from krona_hub.rendering.html.markup import Markup, text

WIDTH, HEIGHT = 460, 280  # user units
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 44  # margins around the plot
DASHES = ("", "7 4", "2 3", "9 3 2 3")  # lines differ by more than color
MOST = 300  # points per curve; more are averaged

Point = tuple[float, float]
Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """A curve, or with `dot` separate points."""

    name: str
    points: Sequence[Point]
    color: int = 0
    thin: bool = False
    dot: bool = False


@dataclass(frozen=True)
class Axis:
    """The title, scale and range of an axis; `lowest` and `highest` fix its ends."""

    title: str  # with the unit
    log: bool = False
    lowest: float | None = None
    highest: float | None = None
    format: Format | None = None


def short(value: float) -> str:
    """Format a number in few characters.

    >>> [short(v) for v in (0, 0.00012, 0.25, 1500, 2_000_000)]
    ['0', '1e-04', '0.25', '1.5 k', '2 M']
    """
    size = abs(value)
    for unit, word in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if size >= unit:
            return f"{value / unit:.3g}{word}"
    return f"{value:.0e}" if 0 < size < 1e-3 else f"{value:.3g}"


def thinned(points: Sequence[Point], most: int = MOST) -> list[Point]:
    """Reduce a curve to at most `most` points, each the mean of neighbors; no point is dropped.

    >>> thinned([(1, 2.0), (2, 4.0), (3, 6.0)], 2)
    [(1.5, 3.0), (3.0, 6.0)]
    """
    per = max(1, -(-len(points) // most))
    groups = [points[i : i + per] for i in range(0, len(points), per)] if per > 1 else []
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups] or list(points)


def chart(title: str, caption: str, x: Axis, y: Axis, lines: Sequence[Line]) -> Markup:
    """A figure with a legend and a caption; empty if no line has a point."""
    lines = [Line(s.name, _plottable(s.points, x, y), s.color, s.thin, s.dot) for s in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup("")
    across = AxisScale.of([p[0] for s in lines for p in s.points], x, LEFT, WIDTH - RIGHT)
    down = AxisScale.of([p[1] for s in lines for p in s.points], y, HEIGHT - BOTTOM, TOP)
    svg = _grid(across, down, x, y) + "".join(_plotted(line, across, down) for line in lines)
    return figure(title, caption, svg, HEIGHT, _legend(lines))


def bars(title: str, caption: str, rows: Sequence[tuple[str, float, str]]) -> Markup:
    """Horizontal bars from zero: (name, value, formatted value)."""
    if not rows:
        return Markup("")
    most, step = max(value for _, value, _ in rows) or 1.0, 26
    lines = [
        f'<text x="0" y="{y + 16}">{text(name)}</text>'
        f'<rect x="160" y="{y + 4}" width="{200 * value / most:.1f}" height="16" fill="var(--c0)"/>'
        f'<text x="{165 + 200 * value / most:.1f}" y="{y + 16}">{text(words)}</text>'
        for y, (name, value, words) in zip(count(0, step), rows, strict=False)
    ]
    return figure(title, caption, "".join(lines), step * len(rows) + 4, Markup(""))


def figure(title: str, caption: str, svg: str, height: int, legend: Markup) -> Markup:
    """A chart with an accessible name."""
    return Markup(
        f'<figure><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{text(title)}">{svg}</svg>{legend}'
        f"<figcaption><strong>{text(title)}.</strong> {text(caption)}</figcaption></figure>"
    )


@dataclass(frozen=True)
class AxisScale:
    """The mapping from values to user units."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def of(cls, values: Sequence[float], axis: Axis, start: float, end: float) -> AxisScale:
        """A scale that shows all values, with a margin at ends that the axis does not fix."""
        low = min(values) if axis.lowest is None else axis.lowest
        high = max(values) if axis.highest is None else max(axis.highest, max(values))
        if axis.log:
            low, high = log10(low), log10(high)
        spare = (high - low) * 0.03 or max(abs(high), 1.0) * 0.1
        return cls(
            low if axis.lowest is not None else low - spare,
            high if axis.highest is not None and high == axis.highest else high + spare,
            start, end, axis.log,
        )  # fmt: skip

    def __call__(self, value: float) -> float:
        share = ((log10(value) if self.log else value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        if not self.log:
            step = _round_step((self.high - self.low) / 5)
            return [i * step for i in range(ceil(self.low / step), floor(self.high / step) + 1)]
        decades = range(ceil(self.low), floor(self.high) + 1)
        wide = self.high - self.low > 2
        marks = [
            m * 10.0**d for d in range(floor(self.low), ceil(self.high) + 1) for m in ((1,) if wide else (1, 2, 5))
        ]
        every = max(1, len(decades) // 6) if wide else 1
        return [v for v in marks if self.low <= log10(v) <= self.high][::every]


def _round_step(rough: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten.

    >>> _round_step(0.13), _round_step(37)
    (0.2, 50.0)
    """
    unit = 10.0 ** floor(log10(rough))
    return next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough * 0.999)


def _plottable(points: Sequence[Point], x: Axis, y: Axis) -> list[Point]:
    """Drop points that an axis cannot show: NaN, infinities, and non-positive values on a logarithmic axis."""
    return [(a, b) for a, b in points if isfinite(a) and isfinite(b) and (a > 0 or not x.log) and (b > 0 or not y.log)]


def _grid(across: AxisScale, down: AxisScale, x: Axis, y: Axis) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in across.ticks():
        at, words = f"{across(value):.1f}", text((x.format or short)(value))
        parts.append(f'<path class="grid" d="M{at} {TOP}V{bottom}"/>')
        parts.append(f'<text class="tick" x="{at}" y="{bottom + 16}" text-anchor="middle">{words}</text>')
    for value in down.ticks():
        height, words = down(value), text((y.format or short)(value))
        parts.append(f'<path class="grid" d="M{LEFT} {height:.1f}H{right}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{words}</text>')
    middle = (TOP + bottom) // 2
    parts.append(f'<text x="{(LEFT + right) // 2}" y="{HEIGHT - 6}" text-anchor="middle">{text(x.title)}</text>')
    parts.append(
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">{text(y.title)}</text>'
    )
    return "".join(parts)


def _plotted(line: Line, across: AxisScale, down: AxisScale) -> str:
    at = [(f"{across(a):.1f}", f"{down(b):.1f}") for a, b in line.points]
    if line.dot:
        return "".join(
            f'<circle cx="{a}" cy="{b}" r="5.5" fill="{_color(line)}"><title>{text(line.name)}</title></circle>'
            for a, b in at
        )
    opacity = ' opacity=".45"' if line.thin else ""
    path = "L".join(f"{a} {b}" for a, b in at)
    ends = "".join(f'<circle cx="{a}" cy="{b}" r="2.5" fill="{_color(line)}"/>' for a, b in at if len(at) <= 40)
    return f'<path d="M{path}" {_stroke(line)}{opacity}/>{ends if not line.thin else ""}'


def _color(line: Line) -> str:
    return "var(--dot)" if line.dot and not line.color else f"var(--c{line.color % 4})"


def _stroke(line: Line) -> str:
    dash = DASHES[line.color % 4]
    dashes = f' stroke-dasharray="{dash}"' if dash and not line.thin else ""
    return f'fill="none" stroke="{_color(line)}" stroke-width="{1 if line.thin else 2}"{dashes}'


def _legend(lines: Sequence[Line]) -> Markup:
    """Name the lines, so that color is never the only distinction."""
    items = "".join(f"<li>{_swatch(line)}{text(line.name)}</li>" for line in lines)
    return Markup(f'<ul class="key">{items}</ul>')


def _swatch(line: Line) -> str:
    inside = (
        f'<circle cx="14" cy="6" r="5" fill="{_color(line)}"/>' if line.dot else f'<path d="M0 6H28" {_stroke(line)}/>'
    )
    return f'<svg viewBox="0 0 28 12" aria-hidden="true">{inside}</svg>'
