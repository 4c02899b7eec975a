"""Write the table and the SVG chart of the runs of quality.py: scores over learning rates, and identity over prompt.

There is one line per kind of adapter; its band ranges from the lowest to the highest seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import log10
from pathlib import Path
from typing import Any

MEASURES = ("identity", "shown", "prompt")
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd")
WIDTH, HEIGHT, LEFT, TOP = 330, 200, 46, 34  # of the plot in a panel, in pixels
WIDE, HIGH = LEFT + WIDTH + 24, TOP + HEIGHT + 36  # of a panel
USEFUL = 0.9  # share of the best identity that a learning rate must reach to count
KEPT = 0.75  # prompt score at which the identity of the kinds is compared


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def values_of(rows: Sequence[dict[str, Any]], variant: str, rate: float, measure: str) -> list[float]:
    return [row[measure] for row in rows if row["way"] == variant and row["rate"] == rate]


def save_report(rows: list[dict[str, Any]], variants: Sequence[str], rates: Sequence[float], stem: Path) -> str:
    """Write `<stem>.svg` and `<stem>.md`; return the text of the latter."""
    text = table(rows, variants, rates)
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".svg").write_text(svg(rows, variants, rates))
    return text


def table(rows: list[dict[str, Any]], variants: Sequence[str], rates: Sequence[float]) -> str:
    """Return a table with the best rate of each kind, and the number of rates near the best identity of all."""
    base = next((row for row in rows if not row["way"]), None)
    cells = [values_of(rows, variant, rate, "identity") for variant in variants for rate in rates]
    top = max((mean(cell) for cell in cells if cell), default=0.0)
    lines = [
        f"| adapter | parameters | best rate | identity | toy shown | prompt score | rates within {USEFUL:.0%} of the "
        f"best identity | identity at a prompt score of {KEPT:.0%} | runs |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    if base:
        lines.append(
            f"| base model alone | 0 | | {base['identity']:.3f} | {base['shown']:.0%} | {base['prompt']:.0%} | | | 1 |"
        )
    lines += [_line(rows, variant, rates, top) for variant in variants if any(row["way"] == variant for row in rows)]
    return "\n".join(lines) + "\n"


def _line(rows: list[dict[str, Any]], variant: str, rates: Sequence[float], top: float) -> str:
    own = [row for row in rows if row["way"] == variant]
    tried = [rate for rate in rates if values_of(rows, variant, rate, "identity")]
    best = max(tried, key=lambda rate: mean(values_of(rows, variant, rate, "identity")))
    near = sum(mean(values_of(rows, variant, rate, "identity")) >= USEFUL * top for rate in tried)
    found = {measure: mean(values_of(rows, variant, best, measure)) for measure in MEASURES}
    return (
        f"| {variant} | {own[0]['parameters']:,} | {best:g} | {found['identity']:.3f} | {found['shown']:.0%} | "
        f"{found['prompt']:.0%} | {near} of {len(tried)} | {identity_at(rows, variant, rates):.3f} | {len(own)} |"
    )


def identity_at(rows: list[dict[str, Any]], variant: str, rates: Sequence[float], kept: float = KEPT) -> float:
    """Return the mean identity at the lowest rate where the mean prompt score falls to `kept`, interpolated."""
    path = _means(rows, variant, rates)
    for (before, low), (after, high) in pairwise(path):
        if before >= kept > after:
            return low + (high - low) * (before - kept) / (before - after)
    return float("nan")


def _means(rows: list[dict[str, Any]], variant: str, rates: Sequence[float]) -> list[tuple[float, float]]:
    """Return (prompt score, identity) for each rate that was tried."""
    cells = [(values_of(rows, variant, rate, "prompt"), values_of(rows, variant, rate, "identity")) for rate in rates]
    return [(mean(prompt), mean(identity)) for prompt, identity in cells if prompt]


def svg(rows: list[dict[str, Any]], variants: Sequence[str], rates: Sequence[float]) -> str:
    """Return four panels, two per row: the measures over the rate, and identity over prompt score."""
    panels = [_panel(rows, variants, rates, measure) for measure in MEASURES] + [_cost_panel(rows, variants, rates)]
    placed = [f'<g transform="translate({n % 2 * WIDE} {n // 2 * HIGH})">{panel}</g>' for n, panel in enumerate(panels)]
    bottom = 2 * HIGH + 16
    legend = [
        f'<text x="{LEFT + 152 * n}" y="{bottom}" fill="{COLORS[n]}">— {variant}</text>'
        for n, variant in enumerate(variants)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDE} {bottom + 20}" width="{2 * WIDE}">'
        "<style>text{font:13px sans-serif}</style>"
        f'<rect width="100%" height="100%" fill="white"/>{"".join(placed)}{"".join(legend)}</svg>\n'
    )


def _panel(rows: list[dict[str, Any]], variants: Sequence[str], rates: Sequence[float], measure: str) -> str:
    parts = _frame(f"{measure} over learning rate")
    parts += [f'<text x="{_x(rate, rates) - 14:.0f}" y="{TOP + HEIGHT + 20}">{rate:g}</text>' for rate in rates]
    parts += [_curve(rows, variant, rates, measure, color) for variant, color in zip(variants, COLORS, strict=True)]
    return "".join(parts)


def _cost_panel(rows: list[dict[str, Any]], variants: Sequence[str], rates: Sequence[float]) -> str:
    """Plot identity over prompt score, one point per rate, from the lowest rate (right) to the highest (left)."""
    parts = _frame("identity over prompt")
    parts += [f'<text x="{LEFT + WIDTH * s - 8:.0f}" y="{TOP + HEIGHT + 20}">{s:g}</text>' for s in (0, 0.5, 1)]
    for color, variant in zip(COLORS, variants, strict=True):
        points = [(LEFT + WIDTH * prompt, _y(identity)) for prompt, identity in _means(rows, variant, rates)]
        line = " ".join(f"{x:.0f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.0f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points]
    return "".join(parts)


def _frame(title: str) -> list[str]:
    """Return the title of a panel, and lines at 0, ½ and 1."""
    parts = [f'<text x="{LEFT}" y="{TOP - 14}" font-weight="bold">{title}</text>']
    for share in (0, 0.5, 1):
        y = _y(share)
        parts.append(f'<path d="M{LEFT} {y}h{WIDTH}" stroke="#ddd"/><text x="{LEFT - 30}" y="{y + 4}">{share:g}</text>')
    return parts


def _x(rate: float, rates: Sequence[float]) -> float:
    first, last = log10(rates[0]), log10(rates[-1])
    return LEFT + WIDTH * (log10(rate) - first) / (last - first)


def _curve(rows: list[dict[str, Any]], variant: str, rates: Sequence[float], measure: str, color: str) -> str:
    found = [(_x(rate, rates), values_of(rows, variant, rate, measure)) for rate in rates]
    found = [(x, values) for x, values in found if values]
    if not found:
        return ""
    line = " ".join(f"{x:.0f},{_y(mean(values)):.1f}" for x, values in found)
    edge = [f"{x:.0f},{_y(max(values)):.1f}" for x, values in found]
    edge += [f"{x:.0f},{_y(min(values)):.1f}" for x, values in reversed(found)]
    return (
        f'<polygon points="{" ".join(edge)}" fill="{color}" opacity="0.12"/>'
        f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>'
    )


def _y(value: float) -> float:
    return TOP + HEIGHT * (1 - value)
