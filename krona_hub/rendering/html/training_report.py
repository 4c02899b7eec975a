"""The page of a training: how the loss fell, what it drew, what it was told, what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from krona_hub.formats.reading.description import Description
from krona_hub.rendering.html.adapter_report import modules_of
from krona_hub.rendering.html.charts import MOST, Axis, Line, Point, chart, thinned
from krona_hub.rendering.html.embedded_images import samples_table
from krona_hub.rendering.html.markup import Markup, facts, page, pair, paragraph, section
from krona_hub.rendering.humanize import human_bytes

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run folder holds, as plain values."""

    name: str
    rows: Sequence[Row]  # of the metrics
    settings: Mapping[str, Any]
    adapter: Description | None
    samples: Mapping[int, Sequence[Path]] = field(default_factory=dict)
    prompts: Sequence[str] = ()


def training_page(run: Run) -> str:
    """The page of a run, finished or not."""
    loss, smooth, validation = (series(run.rows, n) for n in ("loss", "smooth_loss", "validation_loss"))
    return page(
        f"Training {run.name}",
        verdict(run),
        section("Loss", pair(_loss_chart(loss, smooth), _validation_chart(validation)), _rest(run.rows)),
        section("Samples over time", samples_table(run.samples, run.prompts)),
        section("The adapter", *_adapter(run.adapter)),
        section("Settings", facts(run.settings.items(), "Those that were given or chosen")),
    )


def series(rows: Sequence[Row], name: str) -> list[Point]:
    """(step, value) of a measure, where it is a number.

    >>> series([{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}, {"step": 3, "loss": float("nan")}], "loss")
    [(1.0, 0.5)]
    """
    return [
        (float(row["step"]), float(row[name]))
        for row in rows
        if _is_number(row.get("step")) and _is_number(row.get(name))
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def verdict(run: Run) -> str:
    """How far the losses moved, computed; the validation first, as it is drawn from the same noise every time."""
    steps = max((int(row["step"]) for row in run.rows), default=0)
    told = [f"{steps:,}{_of_planned(run, steps)} steps."]
    validation, smooth = series(run.rows, "validation_loss"), series(run.rows, "smooth_loss")
    if len(validation) > 1:
        told.append(_moved("The validation loss", validation) + _best(validation))
    elif smooth:
        told.append(_moved("The smoothed training loss", smooth))
        told.append("There was no validation, so this says little about new pictures.")
    if run.adapter:
        told.append(f"The adapter has {run.adapter.parameters:,} parameters in {len(run.adapter.modules):,} modules.")
    return " ".join(told)


def _of_planned(run: Run, steps: int) -> str:
    """How many there were to be, where the run was stopped before."""
    planned = str(run.settings.get("steps", ""))
    return f" of {int(planned):,}" if planned.isdigit() and int(planned) > steps else ""


def _moved(name: str, values: Sequence[Point]) -> str:
    (_, first), (_, last) = values[0], values[-1]
    if first <= 0:
        return f"{name} went from {first:.4g} to {last:.4g}."
    change = last / first - 1
    word = "fell" if change < -0.001 else "rose" if change > 0.001 else "did not move"
    by = f" by {abs(change):.1%}" if abs(change) > 0.001 else ""
    return f"{name} {word}{by}, from {first:.4g} to {last:.4g}."


def _best(values: Sequence[Point]) -> str:
    step, least = min(values, key=lambda point: point[1])
    later = values[-1][1] > 1.02 * least
    return f" It was lowest at step {int(step):,} ({least:.4g}) and rose again: fewer steps may do." if later else ""


def _loss_chart(loss: Sequence[Point], smooth: Sequence[Point]) -> Markup:
    lines = [Line("loss", thinned(loss), 1, thin=True), Line("smoothed", thinned(smooth), 0)]
    per = -(-len(loss) // MOST)
    each = f"A point is the mean of {per:,} steps. " if per > 1 else ""
    told = f"{each}The smoothed line is an exponential mean. Noise and timesteps are new at every step."
    return chart("Training loss", told, Axis("step"), Axis("loss"), lines)


def _validation_chart(validation: Sequence[Point]) -> Markup:
    dot = Line("first", validation[:1], dot=True)
    told = "Fixed pictures, noise and timesteps: two points can be compared."
    return chart("Validation loss", told, Axis("step"), Axis("loss"), [Line("validation", thinned(validation), 0), dot])


def _rest(rows: Sequence[Row]) -> Markup:
    """The time it took, of steps that measured it."""
    seconds = sorted(v for _, v in series(rows, "seconds"))
    if not seconds:
        return Markup("")
    total = sum(seconds)
    return paragraph(
        f"{total:,.0f} s in {len(seconds):,} steps; the median step took {seconds[len(seconds) // 2]:.3g} s."
    )


def _adapter(about: Description | None) -> tuple[Markup, ...]:
    if about is None:
        return (paragraph("The run has not ended, and has no adapter yet: krona train --resume goes on."),)
    told = [
        ("file", about.path.name),
        ("base", about.base or " or ".join(about.candidates)),
        ("parameters", about.parameters),
        ("size", human_bytes(about.bytes)),
        ("trigger words", ", ".join(about.trigger_words)),
        ("licence", about.licence),
    ]
    return facts(told, "What was written"), modules_of(about)
