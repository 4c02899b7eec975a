"""`calibrate` and `convert_calibrated`: checks the arguments before loading anything. Torch-free until then."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from krona_hub.aliases import Progress
from krona_hub.calibration.prompts import DEFAULT, Prompts, prompt_sets
from krona_hub.calibration.report import CalibrationReport
from krona_hub.calibration.request import SAMPLES, CalibrationRequest, checked_samples
from krona_hub.checkpoints.atomic import check_output
from krona_hub.conversion.api import check_weighted, conversion_request, finished_conversion, prepared_conversion
from krona_hub.conversion.report import ConversionReport
from krona_hub.errors import IntegrityError, KronaError, UsageError
from krona_hub.formats.reading.describe import describe
from krona_hub.images.plan import base_plan
from krona_hub.images.request import checked_machine, checked_settings
from krona_hub.sources import resolve

if TYPE_CHECKING:
    from krona_hub.adapters.moments import Moments
    from krona_hub.calibration.execute import CalibrationSession
    from krona_hub.conversion.prepared import PreparedConversion
    from krona_hub.conversion.request import ConvertRequest


def calibrate(
    adapter: str | Path,
    base: str | Path,
    out: str | Path | None = None,
    *,
    prompts: Prompts = DEFAULT,
    other_prompts: Prompts = DEFAULT,
    held_out: Prompts | None = None,
    trigger: str | None = None,
    samples: int = SAMPLES,
    steps: int | None = None,
    guidance: float | None = None,
    size: str | int | None = None,
    seed: int = 0,
    component: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    offload: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Gather the second moments of an adapter's layers on its base model, for conversions that keep its effect.

    The base model with the adapter generates latents for the prompts; moments are added up at some of its steps.

    Parameters
    ----------
    adapter : file, PEFT folder or Hub id in any format, without DoRA
    base : diffusers folder, checkpoint file, Hub id or "tiny-scenes"
    out : file of the moments; None gathers them without writing
    prompts : prompts with the subject: text file with one per line, list, or "default", which need a trigger word
    other_prompts : prompts without it, in the same forms, or "none"
    held_out : prompts with the subject that are not used; None holds out every fourth of `prompts`
    trigger : word for the subject in the default prompts; None uses that of the adapter
    samples : calls of the denoiser
    steps, guidance, size : of the trajectories; None uses the base model's defaults
    seed : of everything random; equal seeds give equal bytes on one machine
    component, device, dtype, offload, overwrite, progress : as in `convert` and `generate`; (samples done, samples)

    Raises
    ------
    DataError, UsageError, BaseMismatchError, UnknownBaseError : unusable prompts, settings, adapter or base model
    UnsupportedError : DoRA
    StoppedError : interrupted; with `out`, the same call continues

    Examples
    --------
    >>> from importlib.resources import files
    >>> lora = files("krona_hub.assets") / "zorbi_lora_kohya.safetensors"
    >>> report = calibrate(lora, "tiny-scenes", samples=24, device="cpu")
    >>> report.layers, report.samples, report.warnings[0]
    (56, 24, '24 samples are few: below about 200, the result overfits')
    """
    path = resolve(adapter)
    if out is not None:
        check_output(Path(out), overwrite=overwrite)
    request = _request(
        path, base, prompts, other_prompts, held_out, trigger, samples, steps, guidance, size, seed, device, dtype,
        offload,
    )  # fmt: skip
    return _calibrated(request, path, component, None if out is None else Path(out), overwrite, progress)


def _calibrated(
    request: CalibrationRequest,
    path: Path,
    component: str | None,
    out: Path | None,
    overwrite: bool,
    progress: Progress | None,
) -> CalibrationReport:
    from krona_hub.calibration.execute import gathered, held_out, open_session, report_of
    from krona_hub.calibration.moments_file import write_moments
    from krona_hub.calibration.partial_sums import partial_path
    from krona_hub.formats.reading.reader import read

    started = time.perf_counter()
    session = open_session(request, read(path, base=request.base, component=component))
    moments = gathered(session, None if out is None else partial_path(out), progress)
    if out is not None:
        write_moments(moments, out, overwrite=overwrite)
    report = report_of(session, moments, held_out(session), time.perf_counter() - started)
    return replace(report, out=out)


@dataclass(frozen=True)
class CalibratedConversion:
    """A conversion and the calibration that it used; `calibration` is None if the moments came from a file."""

    conversion: ConversionReport
    calibration: CalibrationReport | None


def convert_calibrated(
    source: str | Path,
    out: str | Path | None = None,
    *,
    base: str | Path | None = None,
    prompts: Prompts | None = None,
    moments: str | Path | None = None,
    other_prompts: Prompts = DEFAULT,
    held_out: Prompts | None = None,
    trigger: str | None = None,
    samples: int = SAMPLES,
    steps: int | None = None,
    guidance: float | None = None,
    size: str | int | None = None,
    seed: int = 0,
    fit_gain: bool = True,
    compare: bool = True,
    device: str | None = None,
    compute_dtype: str | None = None,
    offload: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> CalibratedConversion:
    """Convert an adapter to a smaller one by its effect instead of its energy, and measure the effect that is kept.

    Layers become LoRA of the ranks that the moments ask for, or are left out. With `prompts`, a common gain is fitted
    on the calibration, and the effect kept is measured on held-out prompts; with `moments` alone, it is predicted.

    Parameters
    ----------
    source, out, **options : as in `convert`, with one of `budget`, `rank` and `max_error`
    base : base model with weights; not needed with `moments` alone
    prompts : as in `calibrate`; None requires `moments`
    moments : file of moments, which is used if it exists, and otherwise written
    fit_gain : multiply all layers by a gain that is fitted on prompts of the calibration
    compare : also measure a plain cut and a Kronecker sum of the same size
    other_prompts, held_out, trigger, samples, steps, guidance, size, seed : as in `calibrate`
    device, offload, progress : as in `calibrate`
    compute_dtype : dtype of the base model in memory

    Returns
    -------
    CalibratedConversion : the conversion, with predicted and measured effect, and the calibration

    Raises
    ------
    LossyError : less than half of the effect is kept. Also what `calibrate` and `convert` raise.

    Examples
    --------
    >>> from importlib.resources import files
    >>> lora = files("krona_hub.assets") / "zorbi_lora_kohya.safetensors"
    >>> done = convert_calibrated(lora, base="tiny-scenes", prompts="default", budget="1/4", samples=48, device="cpu",
    ...                           dry_run=True)
    >>> done.conversion.parameters_after <= 118784 // 4, done.conversion.effect.kept > 0.9
    (True, True)
    """
    asked = conversion_request(source, out, base=base, **options)
    check_weighted(asked.method)
    known = _known_moments(moments, prompts)
    if prompts is None:
        return CalibratedConversion(finished_conversion(prepared_conversion(replace(asked, moments=known))), None)
    if base is None:
        raise UsageError("--calibrate requires a base model with weights.", fix="Specify it with --base.")
    request = _request(
        asked.path, base, prompts, other_prompts, held_out, trigger, samples, steps, guidance, size, seed, device,
        compute_dtype, offload,
    )  # fmt: skip
    path = None if moments is None else Path(moments)
    return _converted(asked, request, known, path, _Extras(fit_gain, compare), progress)


@dataclass(frozen=True)
class _Extras:
    """What is done besides the cut."""

    fit_gain: bool
    compare: bool


def _converted(
    asked: ConvertRequest,
    request: CalibrationRequest,
    known: Moments | None,
    moments_path: Path | None,
    extras: _Extras,
    progress: Progress | None,
) -> CalibratedConversion:
    from krona_hub.calibration.execute import (
        compared,
        effect_of,
        held_out,
        open_session,
        report_of,
        weights_digest,
    )
    from krona_hub.formats.reading.reader import read

    started = time.perf_counter()
    adapter = read(
        asked.path, base=asked.base, format=asked.from_format, component=asked.component,
        allow_missing=asked.allow_missing,
    )  # fmt: skip
    if known is not None:
        known.check_adapter(adapter)
    session = open_session(request, adapter)
    if known is not None:
        _check_base(known, weights_digest(session.base.path, session.how.pipe))
    moments = known or _gathered(session, moments_path, progress)
    reference = held_out(session)
    report = report_of(session, moments, reference, time.perf_counter() - started)
    conversion = _with_gain(asked, session, moments, extras.fit_gain)
    effect = None if reference is None else effect_of(session, reference, conversion.result)
    done = finished_conversion(conversion, effect)
    if extras.compare and reference is not None and done.relative_error > 0:
        done = replace(done, alternatives=tuple(compared(session, reference, done.parameters_after)))
    done = replace(done, notes=(*done.notes, *report.warnings))
    return CalibratedConversion(done, None if known is not None else report)


def _with_gain(
    asked: ConvertRequest, session: CalibrationSession, moments: Moments, fit_gain: bool
) -> PreparedConversion:
    """Return the conversion, with the fitted gain if something was cut."""
    from krona_hub.calibration.execute import gain_for

    with_moments = replace(asked, moments=moments)
    first = prepared_conversion(with_moments)
    if not fit_gain or first.report.relative_error == 0:
        return first
    gain = gain_for(session, first.result)
    return first if gain == 1 else prepared_conversion(replace(with_moments, gain=gain))


def _gathered(session: CalibrationSession, path: Path | None, progress: Progress | None) -> Moments:
    from krona_hub.calibration.execute import gathered
    from krona_hub.calibration.moments_file import write_moments
    from krona_hub.calibration.partial_sums import partial_path

    moments = gathered(session, None if path is None else partial_path(path), progress)
    if path is not None:
        write_moments(moments, path)
    return moments


def _known_moments(path: str | Path | None, prompts: Prompts | None) -> Moments | None:
    """Read the moments if their file exists."""
    if path is None:
        if prompts is None:
            raise UsageError("Missing prompts or moments.", fix="Add --calibrate default, or --moments FILE.")
        return None
    if prompts is not None and not Path(path).exists():
        check_output(Path(path), overwrite=False)
        return None
    from krona_hub.calibration.moments_file import read_moments

    return read_moments(path)


def _check_base(moments: Moments, digest: str) -> None:
    if moments.record.get("base") != digest:
        raise IntegrityError(
            "The moments were gathered on another base model.", fix="Gather them again with krona calibrate."
        )


def _request(
    path: Path,
    base: str | Path,
    prompts: Prompts,
    other: Prompts,
    held_out: Prompts | None,
    trigger: str | None,
    samples: int,
    steps: int | None,
    guidance: float | None,
    size: str | int | None,
    seed: int,
    device: str | None,
    dtype: str | None,
    offload: str | None,
) -> CalibrationRequest:
    """Check everything that can be checked without torch."""
    settings = checked_settings(None, steps, guidance, None, size, {})
    machine = checked_machine(device, dtype, offload, False, 1)
    if machine.offload == "sequential":
        raise UsageError("Gradients need the weights of the whole denoiser.", fix="Use --offload model, or none.")
    family = base_plan(str(base)).family
    word = trigger or _trigger_of(path, base)
    sets = prompt_sets(prompts, other, held_out, trigger=word, family=family)
    return CalibrationRequest(str(base), sets, checked_samples(samples), seed, settings, machine)


def _trigger_of(path: Path, base: str | Path) -> str | None:
    """Return the first trigger word that a file states; None without one, or if only reading it will show why."""
    try:
        words = describe(path, base=base).trigger_words
    except KronaError:
        return None
    return words[0] if words else None
