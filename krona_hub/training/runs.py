"""A whole training: opened, planned, run, written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from krona_hub.adapter import Adapter
from krona_hub.bases.base import Base
from krona_hub.checkpoints.atomic import atomic_text
from krona_hub.errors import ConflictError, NotFoundError, UsageError
from krona_hub.formats.files import read
from krona_hub.formats.writing import write
from krona_hub.layers import attach, branches_of
from krona_hub.training.batches import Batches
from krona_hub.training.configuration import ECHO, at_home, checked, read_toml, settings_of, to_toml
from krona_hub.training.encoding import Encoder, Source
from krona_hub.training.families import ModelFamily, family_of
from krona_hub.training.interruptions import Stop
from krona_hub.training.loop import (
    Progress,
    Training,
    as_handed_out,
    memory_used,
    one_step,
    resume,
    run_loop,
    same_everywhere,
)
from krona_hub.training.machine import Machine, machine_for, open_base, trained_base
from krona_hub.training.metrics import Metrics, read_metrics, series
from krona_hub.training.objective import Objective
from krona_hub.training.optimisers import Average, make_optimizer
from krona_hub.training.plan import (
    Pictures,
    TrainingPlan,
    check_settings,
    counted,
    forms_of,
    memory_of,
    read_pictures,
)
from krona_hub.training.record import ELSEWHERE, base_name, recorded, trained_adapter
from krona_hub.training.sampling import draw_samples, encode_prompts, forget_samples, save_samples
from krona_hub.training.settings import TrainingSettings
from krona_hub.training.state import saved_states
from krona_hub.training.targets import fresh_adapter, plan_targets, started_from

ADAPTER = "adapter.safetensors"  # in the run folder
FREE = ("steps", "checkpoint_every", "keep_checkpoints", "validate_every", "sample_every", "sample_prompts", "export",
        "sample_steps", "sample_guidance", "licence", *ELSEWHERE)  # what a resumed run may change  # fmt: skip
Tell = Callable[[Progress], None]
Encoding = Callable[[int, int], None]


def _silent(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class TrainingReport:
    """What a training has made."""

    run: Path
    adapter: Path
    exports: tuple[Path, ...]
    steps: int
    layers: int
    parameters: int
    first_loss: float | None  # smoothed
    last_loss: float | None  # smoothed
    validation: tuple[tuple[int, float], ...]  # (step, loss)
    skipped: int  # batches whose loss was no number
    memory: int  # bytes


def train(
    settings: TrainingSettings | Mapping[str, Any] | str | Path | None = None,
    *,
    preset: str | None = None,
    resume_from: str | Path | None = None,
    progress: Tell | None = None,
    encoding: Encoding | None = None,
    **given: Any,
) -> TrainingReport:
    """Train a Kronecker adapter; its run folder gets the adapter, checkpoints, metrics and samples.

    Settings are those of `TrainingSettings`: as a value, a mapping, a TOML file, or keywords, which win. With
    `resume_from`, a run folder, the training goes on from its newest checkpoint. Raises what its parts raise: DataError
    for the pictures, ShapeError for the shapes, UnknownBaseError for the base, DivergedError, StoppedError.
    """
    wanted = resumed_settings(resume_from, given) if resume_from else _settings(settings, preset, given)
    run = _run_folder(wanted, resuming=resume_from is not None)
    training, session = _prepared(wanted, run, encoding or _silent)
    training.tell = progress or _silent
    if resume_from:
        resume(training)
        if training.is_main:
            forget_samples(run, training.step)
    same_everywhere(training)
    run_loop(training)
    return _finished(training, session)


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
    family, base = family_of(pipe), trained_base(pipe)
    targets = plan_targets(base, wanted)
    pictures = read_pictures(pipe, family, wanted)
    seconds = _seconds_per_step(wanted) if timed else None
    per_step = wanted.batch_size * wanted.accumulation
    count = len(pictures.train.examples)
    return TrainingPlan(
        base_name(wanted), family.name, family.process(pipe.scheduler).prediction, str(machine.device),
        str(machine.base_dtype).removeprefix("torch."), count, len(pictures.validation), len(pictures.prior),
        tuple(pictures.train.bad), counted(pictures.sizes), len(targets), forms_of(targets),
        sum(t.parameters for t in targets), wanted.steps, 1, per_step, wanted.steps * per_step / count,
        memory_of(base, pipe, targets, wanted), seconds,
    )  # fmt: skip


def _seconds_per_step(settings: TrainingSettings) -> float:
    """Of the second step, in a folder that is thrown away: the first one also warms up."""
    import time
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        alone = replace(settings, output=folder, trackers=(), sample_every=0)
        training, _ = _prepared(alone, Path(folder), _silent)
        one_step(training, Stop())
        started = time.perf_counter()
        one_step(training, Stop())
        return time.perf_counter() - started


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
    return checked({**old.named, **given, "output": str(place)})


def _run_folder(settings: TrainingSettings, *, resuming: bool) -> Path:
    if not settings.output:
        raise UsageError("no run folder was given.", fix="Give -o runs/NAME.")
    run = Path(settings.output).expanduser()
    run.mkdir(parents=True, exist_ok=True)
    if not resuming and (saved_states(run) or (run / ADAPTER).exists()):
        raise ConflictError(f"{run} holds a training already.", fix=f"Go on with --resume {run}, or choose another -o.")
    return run


# ── preparing ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Session:
    """What the loop does not need and the end does."""

    pipe: Any
    base: Base
    facts: dict[str, Any]


def _prepared(settings: TrainingSettings, run: Path, encoding: Encoding) -> tuple[Training, _Session]:
    check_settings(settings)
    torch.manual_seed(settings.seed)
    machine = machine_for(settings)
    accelerator = _accelerator(settings, machine, run)
    machine = replace(machine, device=accelerator.device)
    pipe = open_base(settings, machine)
    family, base = family_of(pipe), trained_base(pipe)
    start = _start(base, settings)
    pictures = read_pictures(pipe, family, settings)
    encoder = Encoder(pipe, family, settings, machine.device, machine.base_dtype)
    source = Source(encoder, pictures.train.examples, pictures.sizes)
    validation = _beside(encoder, pictures, pictures.validation, settings)
    prior = _beside(encoder, pictures, pictures.prior, settings)
    told = encode_prompts(pipe, family, _sample_prompts(settings), machine.device) if settings.sample_every else None
    for each in (source, validation, prior):
        if each is not None and settings.cache:
            encoder.fill(each.examples, each.sizes, each.captions(settings), encoding)
    encoder.free(keep_vae=told is not None)
    attach(pipe, start, trainable=True)
    parameters: list[Tensor] = [p for branch in branches_of(pipe) for p in branch.parameters() if p.requires_grad]
    model = _denoiser(pipe, family, settings, machine)
    objective = Objective(model, family, family.process(pipe.scheduler), settings, machine.device, machine.base_dtype)
    training = Training(
        settings, run, accelerator, objective, source, _batches(settings, source, accelerator), parameters,
        make_optimizer(parameters, settings), Metrics(run), _fingerprint(settings, pictures), validation,
        None if prior is None else (prior, _batches(settings, prior, accelerator)),
        Average(parameters, settings.ema) if settings.ema else None,
    )  # fmt: skip
    if told is not None:
        training.sample = lambda step: save_samples(
            run, step, draw_samples(pipe, told, settings, machine.device, _side(pictures), step)
        )
    facts = {"base": base_name(settings), "family": family.name, "pictures": len(pictures.train.examples)}
    if accelerator.is_main_process:
        atomic_text(run / ECHO, to_toml(settings), overwrite=True)
    return training, _Session(pipe, base, facts)


def _accelerator(settings: TrainingSettings, machine: Machine, run: Path) -> Accelerator:
    accelerator = Accelerator(
        cpu=machine.device.type == "cpu", mixed_precision=machine.autocast, log_with=list(settings.trackers) or None,
        project_dir=str(run),
    )  # fmt: skip
    if settings.trackers:
        accelerator.init_trackers("krona", config={k: str(v) for k, v in recorded(settings).items()})
    return accelerator


def _start(base: Base, settings: TrainingSettings) -> Adapter:
    """The adapter that the training begins with."""
    if settings.init:
        from krona_hub.sources import resolve

        return started_from(read(resolve(settings.init), base=base), base, settings)
    return fresh_adapter(plan_targets(base, settings), settings)


def _beside(encoder: Encoder, pictures: Pictures, examples: Any, settings: TrainingSettings) -> Source | None:
    return Source(encoder, examples, pictures.sizes_of(examples, settings.buckets)) if examples else None


def _batches(settings: TrainingSettings, source: Source, accelerator: Accelerator) -> Batches:
    return Batches(source.sizes, settings.batch_size, settings.accumulation, accelerator.num_processes, settings.seed)


def _sample_prompts(settings: TrainingSettings) -> tuple[str, ...]:
    return settings.sample_prompts or (settings.prompt,)


def _side(pictures: Pictures) -> int:
    """Of a square sample, pixels."""
    return pictures.resolution // pictures.multiple * pictures.multiple


def _denoiser(pipe: Any, family: ModelFamily, settings: TrainingSettings, machine: Machine) -> Any:
    model = getattr(pipe, family.denoiser)
    wanted = settings.gradient_checkpointing
    if wanted or (wanted is None and machine.is_gpu):
        model.enable_gradient_checkpointing()
    return torch.compile(model) if settings.compile else model


def _fingerprint(settings: TrainingSettings, pictures: Pictures) -> str:
    """Of everything that decides a training's numbers and may not change when it goes on."""
    fixed = {name: value for name, value in settings.named.items() if name not in FREE}
    prior = [e.path.name for e in (*pictures.prior, *pictures.validation)]
    text = json.dumps([fixed, pictures.train.fingerprint, prior], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()


# ── the end ──────────────────────────────────────────────────────────────────────────────────────


def _finished(training: Training, session: _Session) -> TrainingReport:
    settings, run = training.settings, training.run
    adapter_file = run / ADAPTER
    exports: tuple[Path, ...] = ()
    with as_handed_out(training):
        adapter = trained_adapter(session.pipe, session.base, settings, session.facts)
    rows = read_metrics(run)
    smooth = series(rows, "smooth_loss")
    if training.is_main:
        write(adapter, adapter_file, overwrite=True, base=session.base)
        exports = tuple(_export(adapter, settings, name, session.base) for name in settings.export)
    report = TrainingReport(
        run, adapter_file, exports, training.step, len(adapter.layers), adapter.parameters,
        smooth[0][1] if smooth else None, smooth[-1][1] if smooth else None,
        tuple(series(rows, "validation_loss")), training.skipped, memory_used(training),
    )  # fmt: skip
    training.accelerator.wait_for_everyone()
    if training.accelerator.trackers:
        training.accelerator.end_training()
    return report


NAMES = {"lora": "kohya-lora", "lycoris": "lycoris-lokr", "lokr": "lycoris-lokr"}


def _export(adapter: Adapter, settings: TrainingSettings, name: str, base: Base) -> Path:
    """The same adapter in another format, beside it."""
    run = Path(settings.output)
    path = run / f"adapter.{name}.safetensors"
    if name == "lora":
        from krona_hub.conversion import convert

        convert(run / ADAPTER, path, to="lora", exact=True, base=settings.base, overwrite=True)
    else:
        write(adapter, path, format=NAMES.get(name, name), base=base, overwrite=True)
    return path
