"""Execute a plan: generate base by base, write each column when it is complete, then the grid and the record."""

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
    pixels_sha256,
    planned_images,
    prepare_folder,
    write_grid,
    write_images,
    write_record,
)
from krona_hub.images.plan import BasePlan, GeneratePlan
from krona_hub.images.record import make_record
from krona_hub.images.report import GeneratedImage, GenerateReport, PixelDifference
from krona_hub.images.request import Settings

if TYPE_CHECKING:
    from krona_hub.images.image_batches import ColumnImages, LoadedBase


def execute(plan: GeneratePlan, folder: Path | None, progress: Progress) -> GenerateReport:
    """Generate the images; write them if there is a folder. Raises the errors of loading and generating."""
    run = _Run(plan, folder, progress, list(planned_images(plan)), [None] * plan.count)
    for base in plan.bases:
        if any(column.base == base.source for column in plan.columns):
            run.generate(base)
    return run.finish()


@dataclass
class _Run:
    """The state of a run."""

    plan: GeneratePlan
    folder: Path | None
    progress: Progress
    entries: list[GeneratedImage]
    images: list[Any]  # PIL images
    notes: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)  # {} until the first base is loaded
    loaded: LoadedBase | None = None
    first_settings: Settings | None = None  # in force with the first base; the others use the same
    columns_done: int = 0
    seconds: float = 0.0

    def generate(self, base: BasePlan) -> None:
        """Generate all columns of one base."""
        from krona_hub.images.image_batches import generate_columns, load

        self.loaded = None  # frees the memory of the base before
        settings = self.first_settings or self.plan.request.settings
        self.loaded = loaded = load(self.plan, base, settings)
        self.notes += loaded.notes
        self._begin(loaded)
        started = time.monotonic()
        columns = [column for column in self.plan.columns if column.base == base.source]
        for column in generate_columns(loaded, columns, self.plan.rows, self._step(loaded, self.columns_done)):
            self._keep(column)
        self.seconds += time.monotonic() - started

    def _begin(self, loaded: LoadedBase) -> None:
        """Start the record and the folder, once the first base is loaded and the request is known to be possible."""
        if self.record:
            return
        self.first_settings = loaded.settings
        self.record = make_record(
            self.plan, loaded.settings, loaded.scheduler, str(loaded.machine.device), str(loaded.machine.dtype)
        )
        if self.folder is not None:
            prepare_folder(self.folder)

    def _step(self, loaded: LoadedBase, before: int) -> Progress:
        """Report the steps of one base as steps of all bases."""
        each = len(self.plan.rows) * (loaded.settings.steps or 1)
        total = len(self.plan.columns) * each
        return lambda done, _total: self.progress(min(before * each + done, total), total)

    def _keep(self, done: ColumnImages) -> None:
        """Record and write a complete column."""
        self.notes += done.notes
        self.record["size"] = self.record["size"] or list(done.images[0].size)
        number = self.plan.columns.index(done.column)
        cells = range(number, self.plan.count, len(self.plan.columns))
        for cell, image in zip(cells, done.images, strict=True):
            self.images[cell] = image
            self.entries[cell] = replace(self.entries[cell], pixels=pixels_sha256(image))
        if self.folder is not None:
            write_images(self.folder, [(self.entries[c], self.images[c]) for c in cells], self.record)
        self.columns_done += 1

    def finish(self) -> GenerateReport:
        """Write the grid and the record; return the report."""
        record = {**self.record, "pictures": [_to_record(e) for e in self.entries], "grid": grid_name(self.plan)}
        grid = _grid(self.plan, self.images, record) if self.plan.count > 1 else None
        if self.folder is not None:
            if grid is not None:
                write_grid(self.folder, grid, record)
            write_record(self.folder, record)
        return GenerateReport(
            out=self.folder,
            pictures=tuple(self.entries),
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
    """Compare neighboring columns of images given row by row, where two have one size."""
    import numpy as np

    columns = [images[number :: len(labels)] for number in range(len(labels))]
    for (first, left), (second, right) in pairwise(zip(labels, columns, strict=True)):
        pairs = [(a, b) for a, b in zip(left, right, strict=True) if a.size == b.size]
        differences = [float(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).mean()) for a, b in pairs]
        if differences:
            yield PixelDifference(first, second, sum(differences) / len(differences))


def _to_record(image: GeneratedImage) -> dict[str, Any]:
    return {**vars(image), "adapters": dict(image.adapters)}


# --- the grid --------------------------------------------------------------------------------------------------------


def _grid(plan: GeneratePlan, images: Sequence[Any], record: dict[str, Any]) -> Any:
    """Columns by adapters, rows by prompt and seed; a single column becomes columns by seed, rows by prompt."""
    footer = _footer(record)
    if len(plan.columns) > 1:
        return labelled_grid(images, [c.label for c in plan.columns], _row_labels(plan), footer=footer)
    heads = [f"seed {seed}" for seed in plan.request.seeds]
    labels = [RowLabel(prompt) for prompt in plan.request.prompts]
    return labelled_grid(images, heads, labels, plan.columns[0].label, footer)


def _row_labels(plan: GeneratePlan) -> list[RowLabel]:
    """Label rows by prompt and seed, with the prompt in the first of its rows only."""
    first = plan.request.seeds[0]
    return [RowLabel(row.prompt if row.seed == first else "", f"seed {row.seed}") for row in plan.rows]


def _footer(record: dict[str, Any]) -> str:
    """The settings that all images share."""
    facts = [
        record["base"]["source"], f"{record['steps']} steps", record["scheduler_class"],
        f"guidance {record['guidance']:g}" if record["guidance"] is not None else "",
        "×".join(map(str, record["size"])), f"negative: {record['negative']}" if record["negative"] else "",
    ]  # fmt: skip
    return " · ".join(filter(None, facts))
