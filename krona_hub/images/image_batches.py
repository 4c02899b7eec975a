"""Generate the images of a plan: column by column, each base loaded once, each image from noise of its own seed.

Noise is sampled on the CPU, image by image, so that an image depends neither on the device nor on the other images in
its batch.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from krona_hub.aliases import Progress
from krona_hub.errors import UsageError
from krona_hub.images.call_pipeline import (
    call_arguments,
    call_with,
    dtype_for,
    memory_errors,
    open_pipeline,
    set_scheduler,
    settings_in_force,
)
from krona_hub.images.grid_cells import Column, GridRow
from krona_hub.images.plan import BasePlan, GeneratePlan, ImageAdapter
from krona_hub.images.request import ComputeOptions, Settings
from krona_hub.pipelines.opening import device_for, quiet

SMALL = 20_000_000  # parameters
Step = Callable[[int], None]


@dataclass(frozen=True)
class ColumnImages:
    """The images of one column."""

    column: Column
    images: tuple[Any, ...]  # PIL images, one for each row
    notes: tuple[str, ...]


@dataclass(frozen=True)
class LoadedBase:
    """A base in memory with all its adapters, and its settings."""

    pipe: Any
    adapters: tuple[str, ...]  # names
    settings: Settings  # in force
    scheduler: str  # class
    machine: ComputeOptions  # with the device and dtype in use
    notes: tuple[str, ...]


def load(plan: GeneratePlan, base: BasePlan, requested: Settings) -> LoadedBase:
    """Load a base, with the adapters if they are for this base."""
    request = plan.request
    machine = replace(request.machine, device=device_for(request.machine.device))
    machine = replace(machine, dtype=dtype_for(base, machine))
    with memory_errors(machine):
        pipe = open_pipeline(base, machine, request.variant, request.config)
        settings = settings_in_force(pipe, requested, base.preferred)
        scheduler = set_scheduler(pipe, settings.scheduler)
        adapters = plan.adapters if base.source == request.base else ()
        notes = (*cut_prompts(pipe, (row.prompt for row in plan.rows)), *_load_adapters(pipe, adapters))
    return LoadedBase(pipe, tuple(a.name for a in adapters), settings, scheduler, machine, notes)


def _load_adapters(pipe: Any, adapters: Sequence[ImageAdapter]) -> tuple[str, ...]:
    """Load every adapter at strength 0, which costs nothing; return the notes of their readers."""
    from krona_hub.pipelines.load_adapter import load_into

    loaded = {a.name: load_into(pipe, a.path, scale=0.0, name=a.name) for a in adapters}
    return tuple(f"{name}: {note}" for name, report in loaded.items() for note in report.notes)


def cut_prompts(pipe: Any, prompts: Iterable[str]) -> Iterator[str]:
    """Report prompts that are longer than the context of every text encoder."""
    tokenizers = [t for name, t in pipe.components.items() if name.startswith("tokenizer") and callable(t)]
    for prompt in dict.fromkeys(prompts):
        with quiet():
            room = [(t.model_max_length, len(t(prompt)["input_ids"])) for t in tokenizers]
        if room and all(length > most for most, length in room):
            most, length = max(room)
            yield f"{prompt[:40]!r}… has {length} tokens; the base uses the first {most}"


def generate_columns(
    loaded: LoadedBase, columns: Sequence[Column], rows: Sequence[GridRow], progress: Progress
) -> Iterator[ColumnImages]:
    """Generate column by column. `progress` gets the completed denoising steps of these columns, and their total."""
    each = len(rows) * (loaded.settings.steps or 1)
    for number, column in enumerate(columns):
        step = _after(progress, number * each, len(columns) * each)
        _set_strengths(loaded.pipe, loaded.adapters, column.weights)
        with memory_errors(loaded.machine), threads_for(loaded.pipe, loaded.machine.device):
            images = _column(loaded, column, rows, step)
        yield images


@contextmanager
def threads_for(pipe: Any, device: str | None) -> Iterator[None]:
    """Use one thread for a model so small that threads would wait longer than they work."""
    import torch

    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    small = device == "cpu" and sum(p.numel() for m in parts for p in m.parameters()) < SMALL
    before = torch.get_num_threads()
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _after(progress: Progress, before: int, total: int) -> Step:
    return lambda done: progress(before + done, total)


def _set_strengths(pipe: Any, names: Sequence[str], weights: Mapping[str, float]) -> None:
    from krona_hub.layers import set_scales

    if names:
        set_scales(pipe, {name: weights.get(name, 0.0) for name in names})


def _column(loaded: LoadedBase, column: Column, rows: Sequence[GridRow], step: Step) -> ColumnImages:
    images: list[Any] = []
    flagged: list[int] = []
    steps = loaded.settings.steps or 1
    for start in range(0, len(rows), loaded.machine.batch):
        some = rows[start : start + loaded.machine.batch]
        result = _call(loaded, some, _within(step, start * steps, len(some), steps))
        images += result.images
        flagged += [start + i for i, bad in enumerate(getattr(result, "nsfw_content_detected", None) or ()) if bad]
        step((start + len(some)) * steps)
    return ColumnImages(column, tuple(images), tuple(_notes(column, rows, images, flagged)))


def _within(step: Step, before: int, images: int, steps: int) -> Step:
    """Convert callbacks of a pipeline to steps of its images; some schedulers call twice per step."""
    return lambda number: step(before + min(number, steps) * images)


def _call(loaded: LoadedBase, rows: Sequence[GridRow], step: Step) -> Any:
    import torch

    takes = call_arguments(loaded.pipe)
    call = call_with(loaded.settings, list(takes))
    if loaded.settings.negative is not None:
        call["negative_prompt"] = [loaded.settings.negative] * len(rows)
    if "callback_on_step_end" in takes:
        call["callback_on_step_end"] = _counting(step)
    noise = [torch.Generator("cpu").manual_seed(row.seed) for row in rows]
    with _pipeline_errors(loaded), quiet():
        return loaded.pipe(prompt=[row.prompt for row in rows], generator=noise, output_type="pil", **call)


@contextmanager
def _pipeline_errors(loaded: LoadedBase) -> Iterator[None]:
    """Turn errors of schedulers and of arguments into a UsageError; others pass through."""
    try:
        yield
    except (ValueError, TypeError, IndexError, AttributeError) as problem:
        words = " ".join(str(problem).split())[:160]
        if "schedulers" in Path(traceback.extract_tb(problem.__traceback__)[-1].filename).parts:
            steps = loaded.settings.steps
            raise UsageError(
                f"{loaded.scheduler} does not support {steps} steps on this base's noise schedule: {words}.",
                fix="Use another --scheduler, such as ddim or euler, or more --steps.",
            ) from problem
        if loaded.settings.more or loaded.settings.size:
            raise UsageError(
                f"The pipeline rejects its arguments: {words}", fix="Check --size and each --set."
            ) from problem
        raise


def _counting(step: Step) -> Callable[..., dict[str, Any]]:
    def after(_pipe: Any, number: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        step(number + 1)
        return tensors

    return after


def _notes(column: Column, rows: Sequence[GridRow], images: Sequence[Any], flagged: Sequence[int]) -> Iterator[str]:
    """Report images that were generated but are unusable."""
    for number, (row, image) in enumerate(zip(rows, images, strict=True)):
        if number in flagged:
            yield f"{column.label}, seed {row.seed}: blacked out by the safety checker of the base"
        elif all(low == high for low, high in image.convert("RGB").getextrema()):
            yield f"{column.label}, seed {row.seed}: a single color; try --dtype float32 or a lower strength"
