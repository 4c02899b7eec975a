"""The HTML report on a training run: losses, samples, settings, and the resulting adapter."""

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
    """The contents of a run folder, as plain values."""

    name: str
    rows: Sequence[Row]  # metrics
    settings: Mapping[str, Any]
    adapter: Description | None
    samples: Mapping[int, Sequence[Path]] = field(default_factory=dict)
    prompts: Sequence[str] = ()


def training_html(run: Run) -> str:
    """Build the report on a run, finished or not."""
    loss, smooth, validation = (series(run.rows, n) for n in ("loss", "smooth_loss", "validation_loss"))
    return page(
        f"Training {run.name}",
        verdict(run),
        section("Loss", pair(_loss_chart(loss, smooth), _validation_chart(validation)), _timing(run.rows)),
        section("Samples over time", samples_table(run.samples, run.prompts)),
        section("Adapter", *_adapter(run.adapter)),
        section("Settings", facts(run.settings.items(), "Specified or chosen automatically")),
    )


def series(rows: Sequence[Row], name: str) -> list[Point]:
    """Return (step, value) of a metric, without missing, NaN and infinite values.

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
    """Summarize the change of the loss: of the validation if there is one, since it uses the same noise every time."""
    steps = max((int(row["step"]) for row in run.rows), default=0)
    sentences = [f"{steps:,}{_of_planned(run, steps)} steps."]
    validation, smooth = series(run.rows, "validation_loss"), series(run.rows, "smooth_loss")
    if len(validation) > 1:
        sentences.append(_moved("The validation loss", validation) + _best(validation))
    elif smooth:
        sentences.append(_moved("The smoothed training loss", smooth))
        sentences.append("Without validation, this says little about new images.")
    if run.adapter:
        sentences.append(
            f"The adapter has {run.adapter.parameters:,} parameters in {len(run.adapter.modules):,} modules."
        )
    return " ".join(sentences)


def _of_planned(run: Run, steps: int) -> str:
    """The planned number of steps, if the run stopped before."""
    planned = str(run.settings.get("steps", ""))
    return f" of {int(planned):,}" if planned.isdigit() and int(planned) > steps else ""


def _moved(name: str, values: Sequence[Point]) -> str:
    (_, first), (_, last) = values[0], values[-1]
    if first <= 0:
        return f"{name} changed from {first:.4g} to {last:.4g}."
    change = last / first - 1
    word = "fell" if change < -0.001 else "rose" if change > 0.001 else "did not change"
    by = f" by {abs(change):.1%}" if abs(change) > 0.001 else ""
    return f"{name} {word}{by}, from {first:.4g} to {last:.4g}."


def _best(values: Sequence[Point]) -> str:
    step, least = min(values, key=lambda point: point[1])
    later = values[-1][1] > 1.02 * least
    return f" It was lowest at step {int(step):,} ({least:.4g}) and rose again; fewer steps may do." if later else ""


def _loss_chart(loss: Sequence[Point], smooth: Sequence[Point]) -> Markup:
    lines = [Line("loss", thinned(loss), 1, thin=True), Line("smoothed", thinned(smooth), 0)]
    per = -(-len(loss) // MOST)
    each = f"Each point is the mean of {per:,} steps. " if per > 1 else ""
    caption = f"{each}The smoothed line is an exponential moving average. Noise and timesteps change at every step."
    return chart("Training loss", caption, Axis("step"), Axis("loss"), lines)


def _validation_chart(validation: Sequence[Point]) -> Markup:
    dot = Line("first", validation[:1], dot=True)
    caption = "Fixed images, noise and timesteps, so that points are comparable."
    return chart(
        "Validation loss", caption, Axis("step"), Axis("loss"), [Line("validation", thinned(validation), 0), dot]
    )


def _timing(rows: Sequence[Row]) -> Markup:
    """The total and the median time of the measured steps."""
    seconds = sorted(v for _, v in series(rows, "seconds"))
    if not seconds:
        return Markup("")
    total = sum(seconds)
    return paragraph(
        f"{total:,.0f} s in {len(seconds):,} steps; the median step took {seconds[len(seconds) // 2]:.3g} s."
    )


def _adapter(about: Description | None) -> tuple[Markup, ...]:
    if about is None:
        return (paragraph("The run is not finished and has no adapter yet; krona train --resume continues it."),)
    rows = [
        ("file", about.path.name),
        ("base model", about.base or " or ".join(about.candidates)),
        ("parameters", about.parameters),
        ("size", human_bytes(about.bytes)),
        ("trigger words", ", ".join(about.trigger_words)),
        ("license", about.licence),
    ]
    return facts(rows, "The written file"), modules_of(about)
