"""Run a conversion: read, choose, transform and measure (`prepare`), then write or raise (`finish`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.adapters.provenance import Provenance, native_provenance
from krona_hub.aliases import Progress
from krona_hub.conversion.bake_dora import bake_dora
from krona_hub.conversion.convert_layers import (
    ConvertedLayer,
    apply_method,
    check_kind,
    lora_error_within,
)
from krona_hub.conversion.effect_report import LEAST_KEPT, EffectReport
from krona_hub.conversion.layer_errors import measured_layers
from krona_hub.conversion.methods import Budget, Keep, MaxError, Method, Rank
from krona_hub.conversion.output_options import default_out
from krona_hub.conversion.prepared import Layers, PreparedConversion
from krona_hub.conversion.report import REFUSED_ABOVE, ConversionReport, percent, total_error
from krona_hub.conversion.request import ConvertRequest
from krona_hub.conversion.target import ConversionTarget, choose_target, default_method
from krona_hub.conversion.weighted_layers import WeightedLayers, cut_by_moments
from krona_hub.errors import InexpressibleError, LossyError
from krona_hub.formats.forms.normal_forms import has_hadamard, is_lora, size_of, without_hadamard
from krona_hub.formats.known.registry import format_of
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.aim import aim_at
from krona_hub.formats.writing.write_plan import (
    check_names_for,
    check_nothing_left_out,
    fused_layers,
    planned,
    split_layers,
    without_lost_layers,
)
from krona_hub.formats.writing.writer import write_planned
from krona_hub.kron.to_lora import nearest_lora


def execute(request: ConvertRequest, progress: Progress | None = None) -> ConversionReport:
    """Run the request; `convert` documents the errors."""
    return finish(prepare(request, progress))


def prepare(request: ConvertRequest, progress: Progress | None = None) -> PreparedConversion:
    """Compute and measure the result of a request."""
    stored = None if request.dtype is None else getattr(torch, request.dtype)
    adapter = read(
        request.path,
        base=request.base,
        format=request.from_format,
        component=request.component,
        allow_missing=request.allow_missing,
    )
    check_names_for(adapter, request.tool, request.base)
    target = choose_target(adapter, to=request.to, tool=request.tool, method=request.method)
    if request.allow_missing:
        adapter = without_lost_layers(adapter, target.aim(request.split_qkv), request.base)
    method = request.method if request.method is not None else default_method(adapter, target)
    check_kind(method, target.to_lora, [*adapter.layers, *adapter.vectors], has_moments=request.moments is not None)
    baked = bake_dora(adapter, target, method, request.base)
    reference = dict(adapter.layers) | baked  # the result is measured against this
    outcomes, weighted = _outcomes(request, adapter, reference, baked, method, target, progress)
    remaining = {name: o.delta for name, o in outcomes.items() if not o.is_left_out}
    target = target.for_result(remaining.values())
    result = adapter.with_layers(remaining)
    _check_expressible(target, result, request)
    aim = aim_at(result, target.format, request.tool, request.split_qkv)
    plan = planned(result, aim, request.base, stored)
    layers, error_notes = measured_layers(adapter.layers, reference, outcomes, plan.stored, request.base)
    report = ConversionReport(
        source=request.source,
        source_format=request.from_format or format_of(request.path, request.base),
        target_format=target.format,
        tool=request.tool,
        out=request.out if request.out is not None else default_out(request.source, target.format, target.tool),
        layers=layers,
        vectors=len(adapter.vectors),
        vector_parameters=sum(vector.numel() for vector in adapter.vectors.values()),
        vector_error=plan.vector_error,
        left_out=plan.left_out,
        predicted_effect=None if weighted is None else weighted.predicted,
        effect_curve=() if weighted is None else weighted.curve,
        gain=request.gain,
        notes=tuple(dict.fromkeys((*adapter.provenance.warnings, *_dora_note(baked), *error_notes, *plan.notes))),
    )
    return PreparedConversion(request, method, adapter, reference, outcomes, plan, report)


def _outcomes(
    request: ConvertRequest,
    adapter: Adapter,
    reference: Layers,
    baked: Layers,
    method: Method,
    target: ConversionTarget,
    progress: Progress | None,
) -> tuple[dict[str, ConvertedLayer], WeightedLayers | None]:
    """Return the converted layers and, with moments, what they keep by them."""
    if request.moments is not None:
        request.moments.check_adapter(adapter)
        weighted = cut_by_moments(reference, _for_layers(method, adapter), target, request.moments, request.gain)
        return weighted.layers, weighted
    kept = (
        {}
        if request.method
        else {n: d for n, d in adapter.layers.items() if n not in baked and _kept(d, method, target)}
    )
    changed = {name: delta for name, delta in reference.items() if name not in kept}
    outcomes = {name: ConvertedLayer(delta) for name, delta in kept.items()}
    if changed:
        outcomes |= apply_method(changed, _for_layers(method, adapter), target, progress)
    return {n: replace(o, delta=without_hadamard(o.delta, to_lora=target.to_lora)) for n, o in outcomes.items()}, None


def finish(prepared: PreparedConversion, effect: EffectReport | None = None) -> ConversionReport:
    """Write the result, unless it loses too much by what is known best: measured effect, predicted effect, energy."""
    request, plan = prepared.request, prepared.plan
    report = replace(prepared.report, effect=effect)
    if not request.allow_loss:
        _check_loss(prepared, report)
    check_nothing_left_out(plan, allow_missing=request.allow_missing)
    if request.dry_run:
        return report
    written = write_planned(
        plan.with_provenance(_provenance(prepared.source, report, prepared.method, request.path)),
        report.out,
        overwrite=request.overwrite,
        allow_missing=request.allow_missing,
    )
    notes = tuple(dict.fromkeys((*report.notes, *written.notes)))
    return replace(report, checked=str(written), written=True, files=written.files, notes=notes)


def _check_loss(prepared: PreparedConversion, report: ConversionReport) -> None:
    """Raise LossyError for a result that keeps too little of the effect or, if that is unknown, of the delta.

    A size that was given, a budget or a rank, implies the loss, which the verdict states; without moments, only
    rounding that loses as much by itself is then refused.
    """
    known = report.effect.kept if report.effect is not None else report.predicted_effect
    if known is not None:
        if known < LEAST_KEPT:
            raise _too_little_effect(report, known)
        return
    if report.relative_error <= REFUSED_ABOVE:
        return
    request, outcomes, reference = prepared.request, prepared.outcomes, prepared.reference
    unrounded = {name: o.delta for name, o in outcomes.items()}
    if isinstance(request.method, Budget | Rank):
        rounding, _ = measured_layers(unrounded, unrounded, outcomes, prepared.plan.stored, request.base)
        if max(total_error(rounding), report.vector_error) > REFUSED_ABOVE:
            raise _too_coarse(report, request.dtype)
        return
    exact_layers, _ = measured_layers(reference, reference, outcomes, unrounded, request.base)
    is_rounding = request.dtype is not None and total_error(exact_layers) <= REFUSED_ABOVE
    raise _too_coarse(report, request.dtype) if is_rounding else _too_lossy(report, reference)


def _too_little_effect(report: ConversionReport, kept: float) -> LossyError:
    how = "measured on held-out prompts" if report.effect is not None else "predicted by the moments"
    error = LossyError(
        f"The result would keep {percent(max(0.0, kept))} of the effect ({how}); nothing was written.",
        fix="Choose a larger --budget, --rank or a smaller --max-error, or --allow-loss to write this result.",
    )
    error.report = report
    return error


def _for_layers(method: Method, adapter: Adapter) -> Method:
    """Return the method for the layers that do not stay, with a share of the source as a number of parameters.

    Merged DoRA layers are dense, so that a share of theirs would be larger than the source.
    """
    if isinstance(method, Budget):
        return Budget(parameters=method.of(sum(size_of(delta)[0] for delta in adapter.layers.values())))
    return MaxError() if isinstance(method, Keep) else method


def _kept(delta: LayerDelta, method: Method, target: ConversionTarget) -> bool:
    """Return whether a layer stays unchanged without a method: it already has the target's kind, or an application's.

    A LoHa never does.
    """
    if has_hadamard(delta):
        return False
    return isinstance(method, Keep) or is_lora(delta) == target.to_lora or (target.tool is not None and is_lora(delta))


def _dora_note(baked: Mapping[str, LayerDelta]) -> tuple[str, ...]:
    if not baked:
        return ()
    layers = "1 DoRA layer was" if len(baked) == 1 else f"{len(baked)} DoRA layers were"
    return (f"{layers} merged with the base weights into plain deltas: equal only at strength 1",)


def _provenance(adapter: Adapter, report: ConversionReport, method: Method, source: Path) -> Provenance:
    """Return the provenance to write, with the method and the measured errors.

    The total error includes the layers that were left out; the errors by layer are those of the layers of the file.
    """
    errors = {x.layer: x.relative_error for x in report.layers if x.relative_error > 0}
    known, becomes_native = adapter.provenance, report.target_format == "krona" != report.source_format
    return replace(
        native_provenance(source, known) if becomes_native else known,  # no other format can store it
        method=None if isinstance(method, Keep) else f"{method}{_calibrated(report)}",
        relative_error=report.relative_error if errors else None,
        layer_errors={x.layer: errors[x.layer] for x in report.layers if x.layer in errors and not x.is_left_out},
    )


def _calibrated(report: ConversionReport) -> str:
    return "" if report.predicted_effect is None else " --calibrate"


def _check_expressible(target: ConversionTarget, result: Adapter, request: ConvertRequest) -> None:
    """Raise InexpressibleError, with measured alternatives, if the target cannot hold a layer.

    A layer of several terms may be a part of a module that is one term, or its rows may be in several modules of one
    term each.
    """
    refusals = target.refusals(result.layers)
    if refusals and not target.to_lora:
        aim = aim_at(result, target.format, request.tool, request.split_qkv)
        fused = fused_layers(result, aim, request.base)
        still_refused = target.refusals({name: fused[name] for name in refusals if name in fused})
        refusals = {name: why for name, why in refusals.items() if name not in fused or name in still_refused}
    if refusals and not target.to_lora:
        split = split_layers(result, aim, request.base)
        refusals = {n: why for n, why in refusals.items() if n not in split or target.refusals(split[n])}
    if not refusals:
        return
    name, why = next(iter(refusals.items()))
    where = f"{target.format} for {target.tool}" if target.tool else target.format
    raise InexpressibleError(
        f"{len(refusals)} of {len(result)} layers cannot be written as {where}; first: {name}: {why}.",
        fix=_offer(target, result.layers[name], target.refuses_lora(result.layers[name])),
    )


def _offer(target: ConversionTarget, delta: LayerDelta, refuses_lora: bool) -> str:
    """Return the nearest alternatives, measured on the layer that was refused; `krona` is none for an application."""
    if delta.magnitude is not None:
        other = "" if target.tool else ", or use --to krona"
        return f"Specify base weights with --base to merge the DoRA into a plain delta{other}."
    if refuses_lora:
        return "Merge the adapter into the base model, or write a file for no particular application with --to."
    fit = nearest_lora(delta.sums, max_error=0.0)
    rank = fit.up.shape[1]
    if target.to_lora:
        return (
            f"Add --exact for an equal LoRA (rank {rank} for this layer), or --max-error 0.05 or --rank R for a "
            "smaller one."
        )
    any_sum = "" if target.tool else ", or --to krona, which stores any sum"
    return (
        f"Add --max-error 0.05 or --shape a1xa2 to fit one term, or --to lora --exact for an equal LoRA (rank {rank} "
        f"for this layer){any_sum}."
    )


def _too_lossy(report: ConversionReport, layers: Mapping[str, LayerDelta]) -> LossyError:
    """Return the error, with measured alternatives."""
    size = report.parameters_after
    lora = lora_error_within(layers, size)
    whole = report.parameters_before + sum(_growth(delta) for delta in layers.values())
    as_lora = f"--to lora --budget {size} (error {percent(lora)}), " if lora <= REFUSED_ABOVE else ""
    error = LossyError(
        f"The relative error would be {percent(report.relative_error)} (retained energy {percent(report.energy_kept)}; "
        f"a LoRA with {size:,} parameters: error {percent(lora)}); nothing was written.",
        fix=f"Choose {as_lora}--exact (no loss, {whole:,} parameters), --max-error 0.05 (smallest "
        "factorization within 5 % per layer), or --allow-loss to write this result.",
    )
    error.report = report
    return error


def _too_coarse(report: ConversionReport, dtype: str | None) -> LossyError:
    """Return the error for a result whose loss comes from rounding alone."""
    error = LossyError(
        f"Rounding to {dtype} would leave a relative error of {percent(report.relative_error)}; nothing was written.",
        fix="Use --dtype float32 or omit --dtype; --allow-loss writes this result.",
    )
    error.report = report
    return error


def _growth(delta: LayerDelta) -> int:
    """Parameters that an equal delta without elementwise products has more."""
    return size_of(without_hadamard(delta))[0] - size_of(delta)[0] if has_hadamard(delta) else 0
