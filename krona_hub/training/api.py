"""A training from its first line to its last: `train`, and `check_training`, which only plans it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from krona_hub.aliases import Progress
from krona_hub.errors import ConflictError, DivergedError, NotFoundError, StoppedError, UsageError
from krona_hub.pipelines.load_adapter import base_of
from krona_hub.training.configuration import ECHO, at_home, checked, read_toml, settings_of
from krona_hub.training.finish import ADAPTER, TrainingReport, finished
from krona_hub.training.html_report import write_report
from krona_hub.training.loop import Stop, memory_used, one_step, run_loop
from krona_hub.training.model.device import machine_for, open_base
from krona_hub.training.model.model_families import family_of
from krona_hub.training.model.trained_layers import plan_targets
from krona_hub.training.plan import TrainingPlan, check_settings, counted, forms_of, memory_of, read_pictures
from krona_hub.training.progress.checkpoint import resume, same_everywhere, saved_states
from krona_hub.training.progress.regularization_images import prior_folder
from krona_hub.training.progress.samples import forget_samples
from krona_hub.training.progress.training_state import StepReport
from krona_hub.training.settings import TrainingSettings
from krona_hub.training.setup import FREE, prepared
from krona_hub.training.training_record import base_name

Tell = Callable[[StepReport], None]
MOST_TRIED, LONG_ENOUGH = 5, 10.0  # steps of a check, seconds


def _silent(*_: Any) -> None:
    pass


def train(
    settings: TrainingSettings | Mapping[str, Any] | str | Path | None = None,
    *,
    preset: str | None = None,
    resume_from: str | Path | None = None,
    progress: Tell | None = None,
    encoding: Progress | None = None,
    **given: Any,
) -> TrainingReport:
    """Train a Kronecker adapter; its run folder gets the adapter, checkpoints, metrics and samples.

    Settings are those of `TrainingSettings`: as a value, a mapping, a TOML file, or keywords, which win. With
    `resume_from`, a run folder, the training goes on from its newest checkpoint. Raises what its parts raise: DataError
    for the pictures, ShapeError for the shapes, UnknownBaseError for the base, DivergedError, StoppedError.
    """
    if resume_from and (settings or preset):
        raise UsageError(
            f"a run that goes on has its own settings; {str(settings or preset)!r} would be a second set of them.",
            fix="Leave it out; what may change can be given by itself, such as --steps.",
        )
    wanted = resumed_settings(resume_from, given) if resume_from else _settings(settings, preset, given)
    run = _run_folder(wanted, resuming=resume_from is not None)
    try:
        training, session = prepared(wanted, run, encoding or _silent)
    except BaseException:
        with suppress(OSError):
            run.rmdir()  # only an empty one: nothing has begun
        raise
    training.tell = progress or _silent
    if resume_from:
        resume(training)
        if training.is_main:
            forget_samples(run, training.step)
    same_everywhere(training)
    try:
        run_loop(training)
    except (StoppedError, DivergedError):
        if training.is_main:
            write_report(run, run / ADAPTER)
        raise
    return finished(training, session)


def check_training(
    settings: TrainingSettings | Mapping[str, Any] | str | Path | None = None,
    *,
    preset: str | None = None,
    timed: bool = False,
    **given: Any,
) -> TrainingPlan:
    """Everything that can be known before: data, base, shapes, memory; with `timed`, by steps that are thrown away."""
    wanted = _settings(settings, preset, given)
    check_settings(wanted)
    machine = machine_for(wanted)
    pipe = open_base(wanted, machine)
    family, base = family_of(pipe), base_of(pipe)
    targets = plan_targets(base, wanted)
    pictures = read_pictures(pipe, family, wanted)
    tried = _tried(wanted) if timed else None
    per_step = wanted.batch_size * wanted.accumulation
    count = len(pictures.train.examples)
    return TrainingPlan(
        base_name(wanted), family.name, family.process(pipe.scheduler).prediction, str(machine.device),
        str(machine.base_dtype).removeprefix("torch."), count, len(pictures.validation),
        max(len(pictures.prior), wanted.prior_pictures if prior_folder(wanted) else 0),
        tuple(pictures.train.bad), counted(pictures.sizes), len(targets), forms_of(targets),
        sum(t.parameters for t in targets), wanted.steps, 1, per_step, wanted.steps * per_step / count,
        memory_of(base, pipe, targets, wanted), tried.seconds if tried else None, tried.memory if tried else None,
    )  # fmt: skip


class Tried(NamedTuple):
    """What a few steps took."""

    seconds: float  # of one
    memory: int  # bytes that the process has held at most, or the GPU


def _tried(settings: TrainingSettings) -> Tried:
    """Steps in a folder that is thrown away: the first one warms up, and the fastest of some says what the others would
    take on a machine with nothing else to do.
    """
    with TemporaryDirectory() as folder:
        alone = replace(settings, output=folder, trackers=(), sample_every=0)
        if prior_folder(settings):  # nothing is drawn: the pictures themselves take the place of the class
            alone = replace(alone, prior_data=settings.data, prior_prompt="x", prior_pictures=0)
        training, _ = prepared(alone, Path(folder), _silent)
        one_step(training, Stop())
        taken: list[float] = []
        while len(taken) < MOST_TRIED and sum(taken) < LONG_ENOUGH:
            started = time.perf_counter()
            one_step(training, Stop())
            taken.append(time.perf_counter() - started)
        return Tried(min(taken), memory_used(training))


def _settings(given: Any, preset: str | None, more: Mapping[str, Any]) -> TrainingSettings:
    if isinstance(given, TrainingSettings):
        return at_home(checked({**given.named, **more}))
    if isinstance(given, str | Path):
        return at_home(settings_of(more, file=given, preset=preset))
    return at_home(settings_of({**(given or {}), **more}, preset=preset))


def resumed_settings(run: str | Path, given: Mapping[str, Any]) -> TrainingSettings:
    """The settings of a run, with what may change. Raises UsageError for what may not: it would be another training."""
    place = Path(run)
    if not (place / ECHO).is_file():
        raise NotFoundError(f"{run} is no run folder: it has no {ECHO}.", fix="Give the folder of an earlier training.")
    old = checked(read_toml(place / ECHO))
    fixed = [name for name, value in given.items() if name not in FREE and value != getattr(old, name)]
    if fixed:
        raise UsageError(f"{fixed[0]} cannot change in a run that goes on.", fix="Start a new run with --init instead.")
    wanted, done = checked({**old.named, **given, "output": str(place)}), max(saved_states(place), default=0)
    if wanted.steps < done:
        raise UsageError(f"{run} has done {done} steps already.", fix=f"Give --steps {done} or more.")
    return wanted


def _run_folder(settings: TrainingSettings, *, resuming: bool) -> Path:
    if not settings.output:
        raise UsageError("no run folder was given.", fix="Give -o runs/NAME.")
    run = Path(settings.output).expanduser()
    if run.exists() and not run.is_dir():
        raise ConflictError(f"{str(run)!r} is no folder.", fix="Choose another -o.")
    run.mkdir(parents=True, exist_ok=True)
    if not resuming and (saved_states(run) or (run / ADAPTER).exists()):
        raise ConflictError(
            f"{run} holds a training already.", fix=f"Go on with --resume {quote(str(run))}, or choose another -o."
        )
    return run
