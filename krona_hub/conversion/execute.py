"""A conversion carried out: read, choose, transform, measure, refuse or write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.adapters.provenance import native_provenance
from krona_hub.aliases import Progress
from krona_hub.conversion.bake_dora import bake_dora
from krona_hub.conversion.convert_layers import (
    ConvertedLayer,
    apply_method,
    check_kind,
    layer_report,
    lora_error_within,
)
from krona_hub.conversion.methods import Keep, MaxError, Method
from krona_hub.conversion.output_options import default_out
from krona_hub.conversion.report import REFUSED_ABOVE, ConversionReport, LayerReport
from krona_hub.conversion.request import ConvertRequest
from krona_hub.conversion.target import ConversionTarget, choose_target, default_method
from krona_hub.errors import InexpressibleError, LossyError
from krona_hub.formats.forms.normal_forms import is_lora
from krona_hub.formats.known.registry import format_of
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.encode import cast
from krona_hub.formats.writing.writer import write
from krona_hub.kron.norms import norm, relative_difference
from krona_hub.kron.parallel import in_parallel
from krona_hub.kron.to_lora import nearest_lora


def execute(request: ConvertRequest, progress: Progress | None = None) -> ConversionReport:
    """Do what was asked for; `convert` says what is raised."""
    stored = None if request.dtype is None else getattr(torch, request.dtype)
    adapter = read(
        request.path,
        base=request.base,
        format=request.from_format,
        component=request.component,
        allow_missing=request.allow_missing,
    )
    target = choose_target(adapter, to=request.to, tool=request.tool, method=request.method)
    method = request.method if request.method is not None else default_method(adapter, target)
    check_kind(method, target.to_lora, list(adapter.layers))
    baked = bake_dora(adapter, target, method, request.base)
    meant = dict(adapter.layers) | baked  # what the result is measured against
    kept = (
        {}
        if request.method
        else {n: d for n, d in adapter.layers.items() if n not in baked and _kept(d, method, target)}
    )
    changed = {name: delta for name, delta in meant.items() if name not in kept}
    outcomes = {name: ConvertedLayer(delta) for name, delta in kept.items()}
    if changed:
        outcomes |= apply_method(changed, MaxError() if isinstance(method, Keep) else method, target, progress)
    target = target.for_result(o.delta for o in outcomes.values())
    outcomes = {name: replace(o, delta=cast(o.delta, stored)) for name, o in outcomes.items()}

    report = ConversionReport(
        source=request.source,
        source_format=request.from_format or format_of(request.path, request.base),
        target_format=target.format,
        tool=request.tool,
        out=request.out if request.out is not None else default_out(request.source, target.format),
        layers=_layer_reports(adapter.layers, meant, outcomes),
        notes=_dora_note(baked),
    )
    if report.relative_error > REFUSED_ABOVE and not request.allow_loss:
        raise _too_lossy(report, meant)
    _check_expressible(target, outcomes)
    if request.dry_run:
        return report
    written = write(
        _converted(adapter, outcomes, report, method, request.path),
        report.out,
        format=target.format,
        base=request.base,
        tool=request.tool,
        dtype=stored,
        overwrite=request.overwrite,
        split_qkv=request.split_qkv,
    )
    return replace(
        report, checked=str(written), written=True, files=written.files, notes=(*report.notes, *written.notes)
    )


def _kept(delta: LayerDelta, method: Method, target: ConversionTarget) -> bool:
    """Without a way, a layer that is already of the target's kind is not touched."""
    return isinstance(method, Keep) or is_lora(delta) == target.to_lora


def _dora_note(baked: Mapping[str, LayerDelta]) -> tuple[str, ...]:
    if not baked:
        return ()
    return (f"{len(baked)} DoRA layers merged with the base weights into plain deltas: equal at strength 1 only",)


def _layer_reports(
    before: Mapping[str, LayerDelta], meant: Mapping[str, LayerDelta], outcomes: Mapping[str, ConvertedLayer]
) -> tuple[LayerReport, ...]:
    def measured(name: str) -> LayerReport:
        return _layer_report(name, before[name], meant[name], outcomes[name])

    return tuple(report for _, report in in_parallel(measured, list(meant)))


def _layer_report(name: str, before: LayerDelta, meant: LayerDelta, outcome: ConvertedLayer) -> LayerReport:
    """`before` is what the file holds, `meant` the delta it stands for: they differ where a DoRA was merged."""
    unchanged = outcome.delta.sums == meant.sums
    error = 0.0 if unchanged else relative_difference(outcome.delta.sums, meant.sums)
    return layer_report(name, before, outcome, error, norm(meant.sums))


def _converted(
    adapter: Adapter, outcomes: Mapping[str, ConvertedLayer], report: ConversionReport, method: Method, source: Path
) -> Adapter:
    """The adapter to write, with what it was made of and what was measured in its provenance."""
    errors = {x.layer: x.relative_error for x in report.layers if x.relative_error > 0}
    known, becomes_native = adapter.provenance, report.target_format == "krona" != report.source_format
    provenance = replace(
        native_provenance(source, known) if becomes_native else known,  # no other format has a place for it
        method=None if isinstance(method, Keep) else str(method),
        relative_error=report.relative_error if errors else None,
        layer_errors=errors,
    )
    return replace(adapter, layers={name: o.delta for name, o in outcomes.items()}, provenance=provenance)


def _check_expressible(target: ConversionTarget, outcomes: Mapping[str, ConvertedLayer]) -> None:
    """Raise InexpressibleError, with what can be had instead and its error, where the target cannot hold a layer."""
    refusals = target.refusals({name: o.delta for name, o in outcomes.items()})
    if not refusals:
        return
    name, why = next(iter(refusals.items()))
    where = f"{target.format} for {target.tool}" if target.tool else target.format
    raise InexpressibleError(
        f"{len(refusals)} of {len(outcomes)} layers cannot be written as {where}; the first is {name}: {why}.",
        fix=_offer(target, outcomes[name].delta),
    )


def _offer(target: ConversionTarget, delta: LayerDelta) -> str:
    """The nearest things that can be had, measured on the layer that was refused."""
    if delta.magnitude is not None:
        return "Give the base weights with --base, and the DoRA is merged into a plain delta; or use --to krona."
    fit = nearest_lora(delta.sums, max_error=0.0)
    rank = fit.up.shape[1]
    if target.to_lora:
        return (
            f"Add --exact for a LoRA equal to it (rank {rank} here), or --max-error 0.05 or --rank R for a smaller one."
        )
    return (
        f"Give --max-error 0.05 or --shape a1xa2 to fit one term, --to lora --exact for an equal LoRA (rank {rank} "
        "here), or --to krona, which holds any sum."
    )


def _too_lossy(report: ConversionReport, layers: Mapping[str, LayerDelta]) -> LossyError:
    """The refusal, with what else could be had, measured."""
    size = report.parameters_after
    error = LossyError(
        f"the result would be {report.relative_error:.1%} error, with {report.energy_kept:.1%} of the delta's energy "
        "kept; nothing was written.",
        fix=f"A LoRA of the same {size:,} parameters has {lora_error_within(layers, size):.1%} error (--to lora "
        f"--budget {size}); --exact keeps everything in {report.parameters_before:,} parameters; --max-error 0.05 "
        "finds the smallest form within 5 % per layer; --allow-loss writes this one anyway.",
    )
    error.report = report
    return error
