"""Draws the pictures of a plan: column by column, each base loaded once, each picture from noise of its own seed.

Noise is drawn on the CPU, picture by picture, so that a picture depends neither on the device nor on what else is
computed with it.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    memory_told,
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
class Drawn:
    """The pictures of one column."""

    column: Column
    images: tuple[Any, ...]  # PIL images, one for each row
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Ready:
    """A base in memory with all its adapters, and how it draws."""

    pipe: Any
    adapters: tuple[str, ...]  # names
    settings: Settings  # in force
    scheduler: str  # class
    machine: ComputeOptions  # with the device and dtype in use
    notes: tuple[str, ...]


def prepared(plan: GeneratePlan, base: BasePlan, asked_settings: Settings) -> Ready:
    """Load a base, and the adapters where it is the one that they are for."""
    request = plan.request
    machine = replace(request.machine, device=device_for(request.machine.device))
    machine = replace(machine, dtype=dtype_for(base, machine))
    with memory_told(machine):
        pipe = open_pipeline(base, machine, request.variant, request.config)
        settings = settings_in_force(pipe, asked_settings, base.preferred)
        scheduler = set_scheduler(pipe, settings.scheduler)
        adapters = plan.adapters if base.source == request.base else ()
        notes = (*_cut_prompts(pipe, plan.rows), *_load_adapters(pipe, adapters))
    return Ready(pipe, tuple(a.name for a in adapters), settings, scheduler, machine, notes)


def _load_adapters(pipe: Any, adapters: Sequence[ImageAdapter]) -> tuple[str, ...]:
    """Every adapter at strength 0, which costs nothing; what their readers want known."""
    from krona_hub.pipelines.load_adapter import load_into

    loaded = {a.name: load_into(pipe, a.path, scale=0.0, name=a.name) for a in adapters}
    return tuple(f"{name}: {note}" for name, report in loaded.items() for note in report.notes)


def _cut_prompts(pipe: Any, rows: Sequence[GridRow]) -> Iterator[str]:
    """Prompts that are longer than every text encoder reads."""
    readers = [t for name, t in pipe.components.items() if name.startswith("tokenizer") and callable(t)]
    for prompt in dict.fromkeys(row.prompt for row in rows):
        with quiet():
            room = [(t.model_max_length, len(t(prompt)["input_ids"])) for t in readers]
        if room and all(length > most for most, length in room):
            most, length = max(room)
            yield f"{prompt[:40]!r}… has {length} tokens, of which the base reads the first {most}"


def draw(ready: Ready, columns: Sequence[Column], rows: Sequence[GridRow], progress: Progress) -> Iterator[Drawn]:
    """Column by column. `progress` gets the denoising steps that are done, and their total, of these columns."""
    each = len(rows) * (ready.settings.steps or 1)
    for number, column in enumerate(columns):
        step = _after(progress, number * each, len(columns) * each)
        _set_strengths(ready.pipe, ready.adapters, column.weights)
        with memory_told(ready.machine), _threads_for(ready):
            drawn = _column(ready, column, rows, step)
        yield drawn


@contextmanager
def _threads_for(ready: Ready) -> Iterator[None]:
    """One thread for a model so small that threads would wait for each other longer than they work."""
    import torch

    parts = [part for part in ready.pipe.components.values() if isinstance(part, torch.nn.Module)]
    small = ready.machine.device == "cpu" and sum(p.numel() for m in parts for p in m.parameters()) < SMALL
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


def _column(ready: Ready, column: Column, rows: Sequence[GridRow], step: Step) -> Drawn:
    images: list[Any] = []
    flagged: list[int] = []
    steps = ready.settings.steps or 1
    for start in range(0, len(rows), ready.machine.batch):
        some = rows[start : start + ready.machine.batch]
        result = _call(ready, some, _within(step, start * steps, len(some), steps))
        images += result.images
        flagged += [start + i for i, bad in enumerate(getattr(result, "nsfw_content_detected", None) or ()) if bad]
        step((start + len(some)) * steps)
    return Drawn(column, tuple(images), tuple(_notes(column, rows, images, flagged)))


def _within(step: Step, before: int, pictures: int, steps: int) -> Step:
    """Calls of a pipeline as steps of its pictures; some schedulers call twice for a step."""
    return lambda number: step(before + min(number, steps) * pictures)


def _call(ready: Ready, rows: Sequence[GridRow], step: Step) -> Any:
    import torch

    takes = call_arguments(ready.pipe)
    call = call_with(ready.settings, list(takes))
    if ready.settings.negative is not None:
        call["negative_prompt"] = [ready.settings.negative] * len(rows)
    if "callback_on_step_end" in takes:
        call["callback_on_step_end"] = _counting(step)
    noise = [torch.Generator("cpu").manual_seed(row.seed) for row in rows]
    with _refusals_told(ready), quiet():
        return ready.pipe(prompt=[row.prompt for row in rows], generator=noise, output_type="pil", **call)


@contextmanager
def _refusals_told(ready: Ready) -> Iterator[None]:
    """What a scheduler or an argument by name cannot do, as an error of ours; all else is passed on."""
    try:
        yield
    except (ValueError, TypeError, IndexError, AttributeError) as problem:
        words = " ".join(str(problem).split())[:160]
        if "schedulers" in Path(traceback.extract_tb(problem.__traceback__)[-1].filename).parts:
            raise UsageError(
                f"{ready.scheduler} cannot do {ready.settings.steps} steps on this base's noise schedule: {words}.",
                fix="Take another --scheduler, such as ddim or euler, or more --steps.",
            ) from problem
        if ready.settings.more or ready.settings.size:
            raise UsageError(
                f"the pipeline refuses its arguments: {words}", fix="Look at --size and each --set."
            ) from problem
        raise


def _counting(step: Step) -> Callable[..., dict[str, Any]]:
    def after(_pipe: Any, number: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        step(number + 1)
        return tensors

    return after


def _notes(column: Column, rows: Sequence[GridRow], images: Sequence[Any], flagged: Sequence[int]) -> Iterator[str]:
    """What is wrong with a picture although it was made."""
    for number, (row, image) in enumerate(zip(rows, images, strict=True)):
        if number in flagged:
            yield f"{column.label}, seed {row.seed}: blacked out by the safety checker of the base"
        elif all(low == high for low, high in image.convert("RGB").getextrema()):
            yield f"{column.label}, seed {row.seed}: one colour all over; try --dtype float32 or a lower strength"
