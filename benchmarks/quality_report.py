"""Table and SVG of the runs of quality.py: each measure over the learning rate, a line per kind of adapter."""

from __future__ import annotations

from collections.abc import Sequence
from math import log10
from pathlib import Path
from typing import Any

MEASURES = ("identity", "shown", "prompt")
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd")
WIDTH, HEIGHT, LEFT, TOP, GAP = 330, 200, 46, 34, 64  # of a panel, pixels; edges
USEFUL = 0.9  # of the best identity of all: rates that reach it count as working


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def of(rows: Sequence[dict[str, Any]], way: str, rate: float, measure: str) -> list[float]:
    return [row[measure] for row in rows if row["way"] == way and row["rate"] == rate]


def save_report(rows: list[dict[str, Any]], ways: Sequence[str], rates: Sequence[float], stem: Path) -> str:
    """Writes `<stem>.svg` and `<stem>.md`; the latter's text."""
    text = table(rows, ways, rates)
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".svg").write_text(svg(rows, ways, rates))
    return text


def table(rows: list[dict[str, Any]], ways: Sequence[str], rates: Sequence[float]) -> str:
    """The best rate of each kind, and how many rates come near the best of all."""
    base = next((row for row in rows if not row["way"]), None)
    cells = [of(rows, way, rate, "identity") for way in ways for rate in rates]
    top = max((mean(cell) for cell in cells if cell), default=0.0)
    lines = [
        f"| adapter | parameters | best rate | identity | toy shown | prompt | rates within {USEFUL:.0%} | runs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    if base:
        lines.append(
            f"| the base alone | 0 | | {base['identity']:.3f} | {base['shown']:.0%} | {base['prompt']:.0%} | | 1 |"
        )
    lines += [_line(rows, way, rates, top) for way in ways if any(row["way"] == way for row in rows)]
    return "\n".join(lines) + "\n"


def _line(rows: list[dict[str, Any]], way: str, rates: Sequence[float], top: float) -> str:
    own = [row for row in rows if row["way"] == way]
    tried = [rate for rate in rates if of(rows, way, rate, "identity")]
    best = max(tried, key=lambda rate: mean(of(rows, way, rate, "identity")))
    near = sum(mean(of(rows, way, rate, "identity")) >= USEFUL * top for rate in tried)
    found = {measure: mean(of(rows, way, best, measure)) for measure in MEASURES}
    return (
        f"| {way} | {own[0]['parameters']:,} | {best:g} | {found['identity']:.3f} | {found['shown']:.0%} | "
        f"{found['prompt']:.0%} | {near} of {len(tried)} | {len(own)} |"
    )


def svg(rows: list[dict[str, Any]], ways: Sequence[str], rates: Sequence[float]) -> str:
    """A panel for each measure; the line is the mean over seeds, the band from the lowest to the highest."""
    panels = [_panel(rows, ways, rates, measure, number) for number, measure in enumerate(MEASURES)]
    legend = [
        f'<text x="{LEFT + 190 * n}" y="{TOP + HEIGHT + 58}" fill="{COLOURS[n]}">— {way}</text>'
        for n, way in enumerate(ways)
    ]
    wide, high = LEFT + len(MEASURES) * (WIDTH + GAP), TOP + HEIGHT + 74
    style = "text{font:13px sans-serif}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(panels)}{"".join(legend)}</svg>\n'
    )


def _panel(rows: list[dict[str, Any]], ways: Sequence[str], rates: Sequence[float], measure: str, number: int) -> str:
    left = LEFT + number * (WIDTH + GAP)
    parts = [f'<text x="{left}" y="{TOP - 14}" font-weight="bold">{measure} over learning rate</text>']
    for share in (0, 0.5, 1):
        y = TOP + HEIGHT * (1 - share)
        parts.append(f'<path d="M{left} {y}h{WIDTH}" stroke="#ddd"/><text x="{left - 30}" y="{y + 4}">{share:g}</text>')
    parts += [f'<text x="{_x(left, r, rates) - 14:.0f}" y="{TOP + HEIGHT + 20}">{r:g}</text>' for r in rates]
    parts += [_curve(rows, way, rates, measure, left, COLOURS[n]) for n, way in enumerate(ways)]
    return "".join(parts)


def _x(left: float, rate: float, rates: Sequence[float]) -> float:
    first, last = log10(rates[0]), log10(rates[-1])
    return left + WIDTH * (log10(rate) - first) / (last - first)


def _curve(rows: list[dict[str, Any]], way: str, rates: Sequence[float], measure: str, left: float, colour: str) -> str:
    found = [(_x(left, rate, rates), of(rows, way, rate, measure)) for rate in rates]
    found = [(x, values) for x, values in found if values]
    if not found:
        return ""
    line = " ".join(f"{x:.0f},{_y(mean(values)):.1f}" for x, values in found)
    edge = [f"{x:.0f},{_y(max(values)):.1f}" for x, values in found]
    edge += [f"{x:.0f},{_y(min(values)):.1f}" for x, values in reversed(found)]
    return (
        f'<polygon points="{" ".join(edge)}" fill="{colour}" opacity="0.12"/>'
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
    )


def _y(value: float) -> float:
    return TOP + HEIGHT * (1 - value)
