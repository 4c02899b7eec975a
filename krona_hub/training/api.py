"""Train an adapter with `train`, or check and plan a training run with `check_training`."""

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
from krona_hub.pipelines.stop_signal import Stop
from krona_hub.training.configuration import ECHO, checked, read_toml, settings_of, with_absolute_paths
from krona_hub.training.finish import ADAPTER, TrainingReport, finished
from krona_hub.training.html_report import write_report
from krona_hub.training.loop import memory_used, one_step, run_loop
from krona_hub.training.model.device import machine_for, open_base
from krona_hub.training.model.model_families import family_of
from krona_hub.training.model.trained_layers import plan_targets
from krona_hub.training.plan import (
    TrainingPlan,
    check_settings,
    factorization_counts,
    memory_of,
    read_images,
    size_counts,
)
from krona_hub.training.progress.checkpoint import broadcast_factors, resume, saved_states
from krona_hub.training.progress.regularization_images import prior_folder
from krona_hub.training.progress.samples import forget_samples
from krona_hub.training.progress.training_state import StepReport, Training
from krona_hub.training.settings import TrainingSettings
from krona_hub.training.setup import CHANGEABLE, Session, prepared
from krona_hub.training.training_record import base_name

StepCallback = Callable[[StepReport], None]
MAX_TRIAL_STEPS, TRIAL_SECONDS = 5, 10.0  # limits of a timed check, after its warm-up step


def _silent(*_: Any) -> None:
    pass


def train(
    settings: TrainingSettings | Mapping[str, Any] | str | Path | None = None,
    *,
    preset: str | None = None,
    resume_from: str | Path | None = None,
    progress: StepCallback | None = None,
    encoding: Progress | None = None,
    **given: Any,
) -> TrainingReport:
    """Train a Kronecker adapter and write it, with checkpoints, metrics and samples, to the run folder.

    Parameters
    ----------
    settings : TrainingSettings, mapping, path of a TOML file, or None
        Settings; None uses the defaults of `TrainingSettings`.
    preset : str, optional
        Name of a preset; `settings` override it.
    resume_from : path, optional
        Run folder to resume from its newest checkpoint. Excludes `settings` and `preset`.
    progress, encoding : callable, optional
        Called with a `StepReport` after each step; called with (done, total) while images are encoded.
    **given
        Fields of `TrainingSettings`; they override `preset` and `settings`.

    Returns
    -------
    TrainingReport
        Paths of the adapter and its companion exports, number of parameters, losses and peak memory in bytes.

    Raises
    ------
    UsageError, ShapeError, DataError, UnknownBaseError, NoDeviceError
        If the settings, shapes, images, base model or device are unusable.
    ConflictError, IntegrityError
        If the run folder already contains a run, or a resumed run has other data.
    DivergedError, StoppedError
        If the loss becomes NaN or infinite, or the run is interrupted.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as run:
    ...     report = train(preset="tiny-scenes", steps=1, batch_size=1, device="cpu", trackers="none", output=run)
    ...     report.steps, report.layers, report.parameters, report.adapter.is_file()
    (1, 56, 20350, True)
    """
    if resume_from and (settings or preset):
        raise UsageError(
            f"--resume uses the settings of the run; {str(settings or preset)!r} cannot be combined with it.",
            fix="Remove it, and pass settings that may change separately, such as --steps.",
        )
    resolved = resumed_settings(resume_from, given) if resume_from else _settings(settings, preset, given)
    run = _run_folder(resolved, resuming=resume_from is not None)
    training, session = _prepare_in(run, resolved, encoding or _silent)
    training.on_step = progress or _silent
    if resume_from:
        _restore(training)
    broadcast_factors(training)
    _run_steps(training)
    return finished(training, session)


def _prepare_in(run: Path, settings: TrainingSettings, encoding: Progress) -> tuple[Training, Session]:
    try:
        return prepared(settings, run, encoding)
    except BaseException:
        with suppress(OSError):
            run.rmdir()  # succeeds only if nothing has been written yet
        raise


def _restore(training: Training) -> None:
    resume(training)
    if training.is_main:
        forget_samples(training.run, training.step)


def _run_steps(training: Training) -> None:
    """Run the remaining steps. If they end early, write the HTML report before the error propagates."""
    try:
        run_loop(training)
    except (StoppedError, DivergedError):
        if training.is_main:
            write_report(training.run, training.run / ADAPTER)
        raise


def check_training(
    settings: TrainingSettings | Mapping[str, Any] | str | Path | None = None,
    *,
    preset: str | None = None,
    timed: bool = False,
    **given: Any,
) -> TrainingPlan:
    """Check a training run without starting it, and estimate its size, memory and time.

    Parameters
    ----------
    settings, preset, **given
        As in `train`; an output folder is not required.
    timed : bool, default False
        Also run a few steps in a temporary folder to measure time and peak memory.

    Returns
    -------
    TrainingPlan
        Images, layers, factorizations, parameters and memory in bytes; with `timed`, seconds per step and peak memory.

    Raises
    ------
    UsageError, ShapeError, DataError, UnknownBaseError, NotFoundError, NoDeviceError
        As in `train`.

    Examples
    --------
    >>> plan = check_training(preset="tiny-scenes", shape="4x4", text_encoders="none", device="cpu")
    >>> plan.pictures, plan.layers, plan.forms[0]
    (5, 48, ('4x4 ⊗ 20x20', 24))
    """
    resolved = _settings(settings, preset, given)
    check_settings(resolved)
    machine = machine_for(resolved)
    pipe = open_base(resolved, machine)
    family, base = family_of(pipe), base_of(pipe)
    targets = plan_targets(base, resolved)
    images = read_images(pipe, family, resolved)
    trial = _run_trial_steps(resolved) if timed else None
    per_step = resolved.batch_size * resolved.accumulation
    count = len(images.train.examples)
    return TrainingPlan(
        base_name(resolved), family.name, family.process(pipe.scheduler).prediction, str(machine.device),
        str(machine.base_dtype).removeprefix("torch."), count, len(images.validation),
        max(len(images.prior), resolved.prior_pictures if prior_folder(resolved) else 0),
        tuple(images.train.bad), size_counts(images.sizes), len(targets), factorization_counts(targets),
        sum(t.parameters for t in targets), resolved.steps, 1, per_step, resolved.steps * per_step / count,
        memory_of(base, pipe, targets, resolved), trial.seconds if trial else None, trial.memory if trial else None,
    )  # fmt: skip


class TrialSteps(NamedTuple):
    """Time and memory of a few trial steps."""

    seconds: float  # per step
    memory: int  # peak bytes of the GPU, or of the process


def _run_trial_steps(settings: TrainingSettings) -> TrialSteps:
    """Run a few steps in a temporary folder. The first one warms up; the fastest one is the best estimate for an idle
    machine.
    """
    with TemporaryDirectory() as folder:
        trial = replace(settings, output=folder, trackers=(), sample_every=0)
        if prior_folder(settings):  # generate nothing: use the training images as regularization images
            trial = replace(trial, prior_data=settings.data, prior_prompt="x", prior_pictures=0)
        training, _ = prepared(trial, Path(folder), _silent)
        one_step(training, Stop())
        durations: list[float] = []
        while len(durations) < MAX_TRIAL_STEPS and sum(durations) < TRIAL_SECONDS:
            started = time.perf_counter()
            one_step(training, Stop())
            durations.append(time.perf_counter() - started)
        return TrialSteps(min(durations), memory_used(training))


def _settings(given: Any, preset: str | None, overrides: Mapping[str, Any]) -> TrainingSettings:
    if isinstance(given, TrainingSettings):
        return with_absolute_paths(checked({**given.named, **overrides}))
    if isinstance(given, str | Path):
        return with_absolute_paths(settings_of(overrides, file=given, preset=preset))
    return with_absolute_paths(settings_of({**(given or {}), **overrides}, preset=preset))


def resumed_settings(run: str | Path, given: Mapping[str, Any]) -> TrainingSettings:
    """Return the settings of a run, updated with `given`.

    Raises UsageError for a setting that may not change, since the result would be a different training run.
    """
    folder = Path(run)
    if not (folder / ECHO).is_file():
        raise NotFoundError(
            f"{run} is not a run folder: it does not contain {ECHO}.", fix="Specify the folder of an earlier run."
        )
    old = checked(read_toml(folder / ECHO))
    fixed = [name for name, value in given.items() if name not in CHANGEABLE and value != getattr(old, name)]
    if fixed:
        raise UsageError(f"{fixed[0]} cannot change in a resumed run.", fix="Start a new run with --init instead.")
    resolved = checked({**old.named, **given, "output": str(folder)})
    done = max(saved_states(folder), default=0)
    if resolved.steps < done:
        raise UsageError(f"{run} has already completed {done} steps.", fix=f"Use --steps {done} or more.")
    return resolved


def _run_folder(settings: TrainingSettings, *, resuming: bool) -> Path:
    if not settings.output:
        raise UsageError("Missing option --output.", fix="Specify the run folder, such as --output runs/NAME.")
    run = Path(settings.output).expanduser()
    if run.exists() and not run.is_dir():
        raise ConflictError(f"{str(run)!r} is not a folder.", fix="Choose another --output.")
    run.mkdir(parents=True, exist_ok=True)
    if not resuming and (saved_states(run) or (run / ADAPTER).exists()):
        raise ConflictError(
            f"{run} already contains a training run.",
            fix=f"Resume it with --resume {quote(str(run))}, or choose another --output.",
        )
    return run
