"""Run a combination: read, add, recompress on request, measure, then write or raise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.adapters.provenance import Provenance
from krona_hub.aliases import Progress
from krona_hub.checkpoints.digest import file_sha256
from krona_hub.combining.recompression import to_terms, within
from krona_hub.combining.report import CombinedAdapter, CombineReport
from krona_hub.combining.request import CombineInput, CombineRequest
from krona_hub.combining.weighted_sum import weighted_sum
from krona_hub.conversion.convert_layers import ConvertedLayer, error_of, layer_report
from krona_hub.conversion.report import REFUSED_ABOVE, LayerReport, percent
from krona_hub.conversion.target import ConversionTarget
from krona_hub.errors import InexpressibleError, LossyError
from krona_hub.formats.forms.normal_forms import size_of
from krona_hub.formats.known.registry import format_of
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.aim import aim_at
from krona_hub.formats.writing.write_plan import check_nothing_left_out, planned
from krona_hub.formats.writing.writer import write_planned
from krona_hub.kron.norms import norm
from krona_hub.kron.parallel import in_parallel

Layers = Mapping[str, LayerDelta]


def execute(request: CombineRequest, progress: Progress | None = None) -> CombineReport:
    """Run the request; `combine` documents the errors."""
    stored = None if request.dtype is None else getattr(torch, request.dtype)
    target, loaded = ConversionTarget(request.format), [_loaded(x, request) for x in request.inputs]
    weighted = [(adapter, x.weight) for adapter, x in zip(loaded, request.inputs, strict=True)]
    total = weighted_sum(weighted, allow_base_mismatch=request.allow_base_mismatch)
    outcomes = _recompressed(total.layers, request, target, progress)
    _check_expressible(target, outcomes)
    result = replace(total, layers={name: o.delta for name, o in outcomes.items()})
    plan = planned(result, aim_at(result, target.format, None, split_qkv=False), request.base, stored)
    report = CombineReport(
        parts=tuple(_part(x, adapter, request) for x, adapter in zip(request.inputs, loaded, strict=True)),
        target_format=target.format,
        out=request.out,
        layers=_layer_reports(total.layers, outcomes, plan.stored),
        notes=(*total.provenance.notes, *plan.notes),
        left_out=plan.left_out,
        vector_error=plan.vector_error,
        vectors=tuple(total.vectors),
        vector_parameters=sum(vector.numel() for vector in total.vectors.values()),
    )
    _check_loss(report, request.allow_loss)
    check_nothing_left_out(plan, allow_missing=request.allow_missing)
    if request.out is None or request.dry_run:
        return report
    described = plan.with_provenance(_provenance(total, report))
    written = write_planned(described, request.out, overwrite=request.overwrite, allow_missing=True)
    return replace(report, checked=str(written), written=True, files=written.files)


def _loaded(x: CombineInput, request: CombineRequest) -> Adapter:
    if isinstance(x.source, Adapter):
        return x.source
    return read(x.source, base=request.base, component=request.component, allow_missing=request.allow_missing)


def _part(x: CombineInput, adapter: Adapter, request: CombineRequest) -> CombinedAdapter:
    return CombinedAdapter(
        source=x.label,
        weight=x.weight,
        format=None if isinstance(x.source, Adapter) else format_of(x.source, request.base),
        layers=len(adapter),
        parameters=sum(size_of(delta)[0] for delta in adapter.layers.values())
        + sum(vector.numel() for vector in adapter.vectors.values()),
        sha256=file_sha256(x.source) if isinstance(x.source, Path) and x.source.is_file() else None,
        vectors=len(adapter.vectors),
    )


def _recompressed(
    layers: Layers, request: CombineRequest, target: ConversionTarget, progress: Progress | None
) -> dict[str, ConvertedLayer]:
    if request.terms is not None:
        return to_terms(layers, request.terms, progress)
    if request.max_error is not None:
        return within(layers, request.max_error, target, progress)
    return {name: ConvertedLayer(delta) for name, delta in layers.items()}


# --- measuring -------------------------------------------------------------------------------------------------------


def _layer_reports(exact: Layers, outcomes: Mapping[str, ConvertedLayer], stored: Layers) -> tuple[LayerReport, ...]:
    """Return one report per layer; norms are only needed, and computed, if some layer has an error."""
    errors = dict(in_parallel(lambda name: error_of(stored[name], exact[name]), list(exact)))
    norms: dict[str, float] = {}
    if any(errors.values()):
        norms = dict(in_parallel(lambda name: norm(exact[name].sums), list(exact)))
    return tuple(layer_report(n, exact[n], outcomes[n], stored[n], errors[n], norms.get(n, 0.0)) for n in exact)


def _check_loss(report: CombineReport, allowed: bool) -> None:
    if report.relative_error > REFUSED_ABOVE and not allowed:
        raise LossyError(
            f"The relative error would be {percent(report.relative_error)} (retained energy "
            f"{percent(report.energy_kept)}); nothing was written.",
            fix=f"Omit --terms and --max-error for the exact sum ({report.parameters_before:,} parameters), use "
            "--max-error 0.05 for the smallest factorization within 5 % per layer, or --allow-loss to write this "
            "result.",
        )


def _check_expressible(target: ConversionTarget, outcomes: Mapping[str, ConvertedLayer]) -> None:
    refusals = target.refusals({name: o.delta for name, o in outcomes.items()})
    if refusals:
        name, why = next(iter(refusals.items()))
        raise InexpressibleError(
            f"{len(refusals)} of {len(outcomes)} layers of the sum cannot be written as {target.format}; first: "
            f"{name}: {why}.",
            fix="Use --to krona, which stores any sum exactly, --max-error 0.05 for factorizations that this format "
            "supports, or --terms 1 for one term per layer.",
        )


# --- the provenance --------------------------------------------------------------------------------------------------


def _provenance(total: Adapter, report: CombineReport) -> Provenance:
    """Return the provenance of the result, with its parts and the measured errors."""
    errors = {x.layer: x.relative_error for x in report.layers if x.relative_error > 0}
    parts = " + ".join(f"{part.weight:g} · {Path(part.source).name}{_digest(part)}" for part in report.parts)
    return replace(
        total.provenance,
        method=f"combined: {parts}",
        relative_error=report.relative_error if errors else None,
        layer_errors=errors,
    )


def _digest(part: CombinedAdapter) -> str:
    return f" (sha256 {part.sha256})" if part.sha256 else ""
