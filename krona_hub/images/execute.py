"""Carries a plan out: draws base by base, writes each column as soon as it is there, then the grid and the record."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from krona_hub.aliases import Progress
from krona_hub.images.grid_image import RowLabel, labelled_grid
from krona_hub.images.output_files import (
    grid_name,
    make_place,
    pictures_of,
    pixels_sha256,
    write_grid,
    write_pictures,
    write_record,
)
from krona_hub.images.plan import BasePlan, GeneratePlan
from krona_hub.images.record import make_record
from krona_hub.images.report import GeneratedImage, GenerateReport, PixelDifference
from krona_hub.images.request import Settings

if TYPE_CHECKING:
    from krona_hub.images.image_batches import Drawn, Ready


def execute(plan: GeneratePlan, folder: Path | None, progress: Progress) -> GenerateReport:
    """Make the pictures; with a folder, write them. Raises what loading and drawing raise."""
    run = _Run(plan, folder, progress, list(pictures_of(plan)), [None] * plan.count)
    for base in plan.bases:
        if any(column.base == base.source for column in plan.columns):
            run.draw(base)
    return run.finished()


@dataclass
class _Run:
    """A run under way."""

    plan: GeneratePlan
    folder: Path | None
    progress: Progress
    pictures: list[GeneratedImage]
    images: list[Any]  # PIL images
    notes: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)  # {} until the first base is loaded
    ready: Ready | None = None
    first_settings: Settings | None = None  # in force with the first base: the others draw by the same
    columns_done: int = 0
    seconds: float = 0.0

    def draw(self, base: BasePlan) -> None:
        """All columns of one base."""
        from krona_hub.images.image_batches import draw, prepared

        self.ready = None  # the base before goes out of memory
        settings = self.first_settings or self.plan.request.settings
        self.ready = ready = prepared(self.plan, base, settings)
        self.notes += ready.notes
        self._begin(ready)
        started = time.monotonic()
        columns = [column for column in self.plan.columns if column.base == base.source]
        for drawn in draw(ready, columns, self.plan.rows, self._step(ready, self.columns_done)):
            self._keep(drawn)
        self.seconds += time.monotonic() - started

    def _begin(self, ready: Ready) -> None:
        """Once the first base is loaded and everything asked is known to be possible."""
        if self.record:
            return
        self.first_settings = ready.settings
        self.record = make_record(
            self.plan, ready.settings, ready.scheduler, str(ready.machine.device), str(ready.machine.dtype)
        )
        if self.folder is not None:
            make_place(self.folder)

    def _step(self, ready: Ready, before: int) -> Progress:
        """Steps of one base as steps of all."""
        each = len(self.plan.rows) * (ready.settings.steps or 1)
        total = len(self.plan.columns) * each
        return lambda done, _total: self.progress(min(before * each + done, total), total)

    def _keep(self, drawn: Drawn) -> None:
        """A column that is done."""
        self.notes += drawn.notes
        self.record["size"] = self.record["size"] or list(drawn.images[0].size)
        number = self.plan.columns.index(drawn.column)
        places = range(number, self.plan.count, len(self.plan.columns))
        for place, image in zip(places, drawn.images, strict=True):
            self.images[place] = image
            self.pictures[place] = replace(self.pictures[place], pixels=pixels_sha256(image))
        if self.folder is not None:
            write_pictures(self.folder, [(self.pictures[p], self.images[p]) for p in places], self.record)
        self.columns_done += 1

    def finished(self) -> GenerateReport:
        """The grid and the record written; the report."""
        record = {**self.record, "pictures": [_told(p) for p in self.pictures], "grid": grid_name(self.plan)}
        grid = _grid(self.plan, self.images, record) if self.plan.count > 1 else None
        if self.folder is not None:
            if grid is not None:
                write_grid(self.folder, grid, record)
            write_record(self.folder, record)
        return GenerateReport(
            out=self.folder,
            pictures=tuple(self.pictures),
            columns=tuple(column.label for column in self.plan.columns),
            rows=len(self.plan.rows),
            grid=grid_name(self.plan),
            record=record,
            seconds=self.seconds,
            written=self.folder is not None,
            notes=tuple(dict.fromkeys(self.notes)),
            differences=tuple(_differences([c.label for c in self.plan.columns], self.images)),
            images=tuple(self.images),
            grid_image=grid,
        )


def _differences(labels: Sequence[str], images: Sequence[Any]) -> Iterator[PixelDifference]:
    """Of pictures row by row, where those of two columns have one size."""
    import numpy as np

    columns = [images[number :: len(labels)] for number in range(len(labels))]
    for (first, left), (second, right) in pairwise(zip(labels, columns, strict=True)):
        pairs = [(a, b) for a, b in zip(left, right, strict=True) if a.size == b.size]
        apart = [float(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).mean()) for a, b in pairs]
        if apart:
            yield PixelDifference(first, second, sum(apart) / len(apart))


def _told(picture: GeneratedImage) -> dict[str, Any]:
    return {**vars(picture), "adapters": dict(picture.adapters)}


# --- the grid --------------------------------------------------------------------------------------------------------


def _grid(plan: GeneratePlan, images: Sequence[Any], record: dict[str, Any]) -> Any:
    """Columns by adapters, rows by prompt and seed; of one column alone, columns by seed and rows by prompt."""
    footer = _footer(record)
    if len(plan.columns) > 1:
        return labelled_grid(images, [c.label for c in plan.columns], _row_labels(plan), footer=footer)
    heads = [f"seed {seed}" for seed in plan.request.seeds]
    labels = [RowLabel(prompt) for prompt in plan.request.prompts]
    return labelled_grid(images, heads, labels, plan.columns[0].label, footer)


def _row_labels(plan: GeneratePlan) -> list[RowLabel]:
    """A prompt stands at the first of its rows."""
    first = plan.request.seeds[0]
    return [RowLabel(row.prompt if row.seed == first else "", f"seed {row.seed}") for row in plan.rows]


def _footer(record: dict[str, Any]) -> str:
    """What all pictures have in common."""
    facts = [
        record["base"]["source"], f"{record['steps']} steps", record["scheduler_class"],
        f"guidance {record['guidance']:g}" if record["guidance"] is not None else "",
        "×".join(map(str, record["size"])), f"negative: {record['negative']}" if record["negative"] else "",
    ]  # fmt: skip
    return " · ".join(filter(None, facts))
