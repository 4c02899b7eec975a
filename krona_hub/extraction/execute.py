"""Run an extraction: pair, subtract, fit, measure, then write or raise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.adapters.provenance import Provenance
from krona_hub.aliases import Progress
from krona_hub.conversion.report import REFUSED_ABOVE, percent
from krona_hub.conversion.target import ConversionTarget
from krona_hub.errors import InexpressibleError, LossyError, NoDifferenceError
from krona_hub.extraction.fit_layers import Fitted, fit, steps_of
from krona_hub.extraction.fit_plan import FitPlan
from krona_hub.extraction.layer_difference import LayerDifference
from krona_hub.extraction.other_tensors import ChangedTensor, changes, extras_of, vectors_of
from krona_hub.extraction.report import ExtractionReport
from krona_hub.extraction.request import ExtractRequest
from krona_hub.extraction.tensor_pairs import Pairs, pair_up
from krona_hub.formats.writing.aim import aim_at
from krona_hub.formats.writing.write_plan import planned
from krona_hub.formats.writing.writer import write_planned
from krona_hub.kron.norms import relative_difference

REORDERED = 1e-12  # relative difference of equal factors whose products are added in another order

EMA_NOTE = "the EMA weights (model_ema) in the file are not compared: applications do not use them to generate images"


def execute(request: ExtractRequest, progress: Progress | None = None) -> ExtractionReport:
    """Run the request; `extract` documents the errors."""
    target = ConversionTarget(request.format)
    dtype = None if request.dtype is None else getattr(torch, request.dtype)
    plan = FitPlan(request.fit, target, dtype, request.threads)
    pairs = pair_up(
        request.base_path,
        request.tuned_path,
        component=request.component,
        targets=request.targets,
        base_name=request.base_name,
    )
    fitted = fit(pairs.layers, plan, _steps(progress, steps_of(plan) * len(pairs.layers)))
    found = list(changes(pairs.others, pairs.model))
    report, adapter = _checked(request, pairs, fitted, found, target)
    file = planned(adapter, aim_at(adapter, target.format, None, split_qkv=False), pairs.model, dtype)
    if file.left_out:
        raise InexpressibleError(
            f"{target.format} has no place for {file.left_out}.",
            fix="Omit --also-vectors to leave them out, or use --to krona.",
        )
    again = [_as_stored(f, file.stored) for f in fitted]
    if again != fitted:
        report, adapter = _checked(request, pairs, again, found, target)
    if request.dry_run:
        return report
    written = write_planned(file.with_provenance(adapter.provenance), request.out, overwrite=request.overwrite)
    notes = (*report.notes, *written.notes)
    return replace(report, checked=str(written), written=True, files=written.files, notes=notes)


def _checked(
    request: ExtractRequest,
    pairs: Pairs,
    fitted: Sequence[Fitted],
    found: Sequence[ChangedTensor],
    target: ConversionTarget,
) -> tuple[ExtractionReport, Adapter]:
    report = _report(request, pairs, fitted, found)
    adapter = _adapter(report, pairs, fitted, found if request.also_vectors else [])
    _check(report, adapter, fitted, target, request.allow_loss)
    return report, adapter


def _as_stored(fitted: Fitted, stored: Mapping[str, LayerDelta]) -> Fitted:
    """Measure a layer again if the module that it is fused into stores other numbers than the layer alone."""
    delta = stored.get(fitted.pair.name)
    if fitted.taken is None or delta is None:
        return fitted
    if relative_difference(delta.sums, fitted.taken.delta.sums) <= REORDERED:
        return fitted
    difference = LayerDifference.of(fitted.pair)
    return fitted if difference is None else replace(fitted, taken=difference.measured(delta, fitted.taken.report.note))


def _report(
    request: ExtractRequest, pairs: Pairs, fitted: Sequence[Fitted], found: Sequence[ChangedTensor]
) -> ExtractionReport:
    return ExtractionReport(
        base=request.base,
        tuned=request.tuned,
        target_format=request.format,
        out=request.out,
        method=str(request.fit),
        layers=tuple(f.taken.report for f in fitted if f.taken is not None),
        unchanged=sum(f.taken is None and not f.is_rounding for f in fitted),
        at_rounding=tuple(f.pair.name for f in fitted if f.is_rounding),
        others=tuple(replace(c.report, kept=request.also_vectors and c.report.storable) for c in found),
        notes=_notes(pairs),
    )


def _steps(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    return step


def _adapter(
    report: ExtractionReport, pairs: Pairs, fitted: Sequence[Fitted], kept: Sequence[ChangedTensor]
) -> Adapter:
    """Return the adapter to write: the layers with a difference above the noise, and the other changes to keep."""
    layers = {f.pair.name: f.taken.delta for f in fitted if f.taken is not None and f.taken.delta.sums}
    provenance = Provenance(
        method=report.method,
        relative_error=report.relative_error,
        layer_errors={x.layer: x.relative_error for x in report.layers if x.layer in layers},
    )
    return Adapter(layers, pairs.model.model, provenance, extras_of(kept), vectors_of(kept))


def _check(
    report: ExtractionReport, adapter: Adapter, fitted: Sequence[Fitted], target: ConversionTarget, allow_loss: bool
) -> None:
    """Raise if the result is empty, loses too much, or does not fit the format."""
    others = bool(adapter.extras or adapter.vectors)
    if not report.layers and not others:
        raise _no_difference(report)
    if report.beyond_rounding > REFUSED_ABOVE and not allow_loss:
        raise _too_lossy(report, fitted)
    if not adapter.layers and not others:
        raise _no_difference(report)
    refusals = target.refusals(adapter.layers)
    if refusals:
        name, why = next(iter(refusals.items()))
        raise InexpressibleError(
            f"{len(refusals)} of {len(adapter)} layers cannot be written as {target.format}; first: {name}: {why}.",
            fix="Use --to krona, which stores any sum, --to lora, or --shape auto.",
        )


def _no_difference(report: ExtractionReport) -> NoDifferenceError:
    vectors = sum(x.storable for x in report.not_captured)
    fix = f"Add --also-vectors to keep the {vectors} norms, biases or embeddings that differ." if vectors else ""
    if report.at_rounding:
        return NoDifferenceError(
            f"No difference above rounding: {len(report.at_rounding)} layers differ only by the rounding of their "
            "stored dtypes.",
            fix=fix or "Compare checkpoints with higher precision, if available.",
        )
    return NoDifferenceError(
        f"Nothing to extract: all {report.unchanged} layers are equal.", fix=fix or "Check the paths of both files."
    )


def _too_lossy(report: ExtractionReport, fitted: Sequence[Fitted]) -> LossyError:
    """Return the error, with the number of terms that would suffice."""
    offer = _terms_for(REFUSED_ABOVE, [f for f in fitted if f.taken is not None])
    return LossyError(
        f"The relative error would be {percent(report.relative_error)} (retained energy "
        f"{percent(report.energy_kept)}); nothing was written.",
        fix=f"Use {offer}--max-error 0.05 (smallest factorization within 5 % per layer), --shape auto (tries all "
        "shapes and LoRA), or --allow-loss to write this result.",
    )


def _terms_for(error: float, fitted: Sequence[Fitted]) -> str:
    """Return the number of terms of the same shape within that total error, if known."""
    curves = [f.curve.left for f in fitted if f.curve is not None]
    if not curves or len(curves) < len(fitted):
        return ""
    whole = sum(left[0] for left in curves)
    for terms in range(1, max(map(len, curves))):
        if sum(left[min(terms, len(left) - 1)] for left in curves) <= error**2 * whole:
            return f"--terms {terms} (error below {100 * error:.0f} % with this shape), "
    return ""


def _notes(pairs: Pairs) -> tuple[str, ...]:
    sides = (("the tuned checkpoint", pairs.only_base), ("the base checkpoint", pairs.only_tuned))
    lacking = (
        f"{words} lacks {len(names)} layers of the other, such as {names[0]}; they are omitted"
        for words, names in sides
        if names
    )
    return (*lacking, *((EMA_NOTE,) if pairs.ema else ()))
