"""Run a calibration: open the base with the adapter, record calls, gather moments, measure a result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from krona_hub.adapters.adapter import Adapter
from krona_hub.adapters.moments import Moments, delta_digest
from krona_hub.aliases import Progress
from krona_hub.calibration.baselines import baselines
from krona_hub.calibration.denoiser_calls import DenoiserCall, RepeatedCall, Trajectory, denoiser_of, record_calls
from krona_hub.calibration.gather_moments import MomentGatherer
from krona_hub.calibration.measure_effect import SOURCE, References, fitted_gain, measured, references
from krona_hub.calibration.partial_sums import read_partial, write_partial
from krona_hub.calibration.report import CalibrationReport
from krona_hub.calibration.request import POINTS, CalibrationRequest, sample_warnings
from krona_hub.checkpoints.digest import file_sha256_once
from krona_hub.conversion.effect_report import EffectReport
from krona_hub.errors import DataError, StoppedError, UnsupportedError, abbreviated, counted
from krona_hub.images.call_pipeline import dtype_for, memory_errors, open_pipeline, settings_in_force
from krona_hub.images.image_batches import cut_prompts, threads_for
from krona_hub.images.plan import BasePlan, base_plan
from krona_hub.layers import attach
from krona_hub.pipelines.opening import device_for
from krona_hub.pipelines.stop_signal import stoppable

EMPTY_EVERY = 4  # one of so many prompts without the subject gives calls with the empty prompt, which guidance uses
GAIN_PROMPTS = 8  # of each kind, for the fit of the gain
FEW_HELD_OUT = 8  # prompts: with fewer, the effect and its range depend on the prompts
BREAKS_OTHERS = 0.5  # change of other prompts, as a share of that with the subject, worth a warning
SAVE_EVERY = 60.0  # seconds between saved states
SUBJECT, OTHER = "subject", "other"


@dataclass(frozen=True)
class CalibrationSession:
    """A base model in memory, with the source adapter attached."""

    request: CalibrationRequest
    base: BasePlan
    adapter: Adapter
    how: RepeatedCall
    trajectory: Trajectory

    @property
    def seed(self) -> int:
        return self.request.seed

    def calls(self, prompt: str, number: int, role: str, *, empty: bool = False) -> list[DenoiserCall]:
        with memory_errors(self.request.machine):
            return record_calls(self.how.pipe, prompt, number, role, self.trajectory, empty=empty)


def open_session(request: CalibrationRequest, adapter: Adapter) -> CalibrationSession:
    """Load the base model and attach the adapter.

    Raises BaseMismatchError if it does not fit, UnsupportedError for DoRA, DataError for prompts that are too long, and
    the errors of loading.
    """
    doras = [name for name, delta in adapter.layers.items() if delta.magnitude is not None]
    if doras:
        raise UnsupportedError(
            f"{len(doras)} DoRA layers cannot be calibrated ({abbreviated(doras)}).",
            fix="Convert the adapter without calibration.",
        )
    base = base_plan(request.base, request.variant, request.config)
    machine = replace(request.machine, device=device_for(request.machine.device))
    machine = replace(machine, dtype=dtype_for(base, machine))
    with memory_errors(machine):
        pipe = open_pipeline(base, machine, request.variant, request.config)
        settings = settings_in_force(pipe, request.settings, base.preferred)
        attach(pipe, adapter, SOURCE)
    long = list(cut_prompts(pipe, request.prompts.all))
    if long:
        raise DataError(f"A prompt is too long for the text encoder: {long[0]}.", fix="Shorten it.")
    text = any(component.startswith("text_encoder") for component in adapter.components)
    how = RepeatedCall(pipe, torch.device(str(machine.device)), getattr(torch, str(machine.dtype)), text)
    request = replace(request, machine=machine, settings=settings)
    return CalibrationSession(request, base, adapter, how, Trajectory(settings, request.seed, POINTS, POINTS))


# --- moments ---------------------------------------------------------------------------------------------------------


def gathered(session: CalibrationSession, partial: Path | None = None, progress: Progress | None = None) -> Moments:
    """Gather the moments of the adapter.

    With `partial`, the sums are saved there every minute and on an interruption, and an interrupted run continues.
    """
    request = session.request
    record = record_of(session)
    gatherer = MomentGatherer(session.how, session.adapter, request.seed)
    rounds = request.rounds
    done = _restored(gatherer, partial, record)
    saved = time.monotonic()
    with threads_for(session.how.pipe, request.machine.device), stoppable() as stop:
        for number in range(done, len(rounds)):
            _add(session, gatherer, rounds[number], number)
            if progress:
                progress(gatherer.samples, request.samples)
            due = time.monotonic() - saved > SAVE_EVERY
            if partial is not None and (due or stop.requested):
                write_partial(partial, gatherer.state, record, number + 1)
                saved = time.monotonic()
            if stop.requested:
                raise _stopped(gatherer.samples, request.samples, partial)
    if partial is not None:
        partial.unlink(missing_ok=True)
    record["samples"] = gatherer.samples
    return Moments(gatherer.moments(), str(record["adapter"]), record)


def _add(session: CalibrationSession, gatherer: MomentGatherer, planned: tuple[str, bool, int], number: int) -> None:
    """Record the calls of one trajectory and add their moments."""
    prompt, has_subject, nth = planned
    role = SUBJECT if has_subject else OTHER
    is_empty = not has_subject and nth % EMPTY_EVERY == EMPTY_EVERY - 1
    calls = session.calls(prompt, nth, role, empty=is_empty)
    with memory_errors(session.request.machine):
        gatherer.add(calls, number)


def _stopped(done: int, samples: int, partial: Path | None) -> StoppedError:
    fix = "Run the same command again to continue." if partial is not None else "Nothing was written."
    return StoppedError(f"Stopped after {done} of {samples} samples.", fix=fix)


def _restored(gatherer: MomentGatherer, partial: Path | None, record: Mapping[str, Any]) -> int:
    """Return the number of trajectories that an interrupted run has already added."""
    found = None if partial is None else read_partial(partial, record)
    if found is None:
        return 0
    gatherer.restore(found.state)
    return found.done


def record_of(session: CalibrationSession) -> dict[str, Any]:
    """Return what the moments depend on besides the adapter, as JSON."""
    request, settings = session.request, session.request.settings
    return {
        "base": weights_digest(session.base.path, session.how.pipe),
        "base_name": session.base.family or session.base.source,
        "adapter": delta_digest(session.adapter),
        "prompts": list(request.prompts.subject),
        "other_prompts": list(request.prompts.other),
        "trajectories": len(request.rounds),
        "seed": request.seed,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "size": settings.size,
        "calls": [session.trajectory.points, session.trajectory.renoised],
        "dtype": request.machine.dtype,
    }


def weights_digest(path: Path, pipe: Any) -> str:
    """Return the sha256 of the weight files of a base model: of the denoiser, or of its single file."""
    if path.is_file():
        return file_sha256_once(path)
    folder = path / ("unet" if denoiser_of(pipe) is getattr(pipe, "unet", None) else "transformer")
    digests = [file_sha256_once(file) for file in sorted(folder.glob("*.safetensors"))]
    return json.dumps(digests) if len(digests) != 1 else digests[0]


# --- effect ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """Reference outputs on held-out prompts, with and without the subject."""

    subject: References
    other: References | None


def recorded(
    session: CalibrationSession, prompts: Sequence[str], role: str, tick: Callable[[int], None] = lambda _calls: None
) -> References:
    """Record a trajectory of each prompt, and compute the reference outputs."""
    with threads_for(session.how.pipe, session.request.machine.device):
        groups = [session.calls(prompt, number, role) for number, prompt in enumerate(prompts)]
        with memory_errors(session.request.machine):
            return references(session.how, groups, tick)


def held_out(session: CalibrationSession) -> HeldOut | None:
    """Record held-out prompts; None without any with the subject."""
    prompts = session.request.prompts
    if not prompts.held_out:
        return None
    subject = recorded(session, prompts.held_out, f"held-out {SUBJECT}")
    other = recorded(session, prompts.held_out_other, f"held-out {OTHER}") if prompts.held_out_other else None
    return HeldOut(subject, other)


def gain_for(session: CalibrationSession, result: Adapter) -> float:
    """Fit the strength of a result on prompts of the calibration."""
    kinds = {SUBJECT: session.request.prompts.subject, OTHER: session.request.prompts.other}
    known = [recorded(session, prompts[:GAIN_PROMPTS], f"gain {kind}") for kind, prompts in kinds.items() if prompts]
    with threads_for(session.how.pipe, session.request.machine.device):
        return fitted_gain(session.how, known, result)


def effect_of(session: CalibrationSession, known: HeldOut, result: Adapter) -> EffectReport:
    """Measure what a result keeps on the held-out prompts."""
    started = time.perf_counter()
    prompts = session.request.prompts
    with threads_for(session.how.pipe, session.request.machine.device), memory_errors(session.request.machine):
        kept = measured(session.how, known.subject, result)
        others = measured(session.how, known.other, result) if known.other else None
    return EffectReport(
        kept=kept.effect,
        kept_range=kept.effect_range(session.seed),
        strength=kept.strength,
        other_kept=None if others is None else others.effect,
        drift=None if others is None else others.drift,
        prompts=prompts.held_out,
        other_prompts=prompts.held_out_other,
        samples=sum(map(len, known.subject.groups)),
        other_samples=sum(map(len, known.other.groups)) if known.other else 0,
        seed=session.seed,
        seconds=time.perf_counter() - started,
    )


def compared(session: CalibrationSession, known: HeldOut, parameters: int) -> Iterator[str]:
    """Yield what other factorizations of that size keep of the effect."""
    with threads_for(session.how.pipe, session.request.machine.device), memory_errors(session.request.machine):
        yield from baselines(session.how, known.subject, session.adapter, parameters)


def report_of(
    session: CalibrationSession, moments: Moments, known: HeldOut | None, seconds: float
) -> CalibrationReport:
    """Summarize a calibration, with the warnings that it asks for."""
    request, change = session.request, None
    if known is not None and known.other is not None and known.subject.effects:
        change = known.other.effects / known.subject.effects
    warnings = [*sample_warnings(request)]
    if known is None:
        warnings.append("no prompts are held out, so that the effect is predicted, not measured: give 4 or more")
    elif len(request.prompts.held_out) < FEW_HELD_OUT:
        count = counted(len(request.prompts.held_out), "held-out prompt")
        warnings.append(f"the measured effect and its range are those of {count} only")
    if change is not None and change > BREAKS_OTHERS:
        warnings.append(
            f"the source adapter changes prompts without the subject by {change:.0%} of its change with it; a faithful "
            "result inherits that"
        )
    return CalibrationReport(
        layers=len(moments.layers),
        samples=int(moments.record["samples"]),
        prompts=request.prompts.subject,
        other_prompts=request.prompts.other,
        seed=request.seed,
        steps=request.settings.steps,
        guidance=request.settings.guidance,
        other_change=change,
        nbytes=moments.nbytes,
        seconds=seconds,
        warnings=tuple(warnings),
    )
