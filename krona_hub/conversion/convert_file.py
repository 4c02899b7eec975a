"""`convert`: read, choose, transform, measure, refuse or write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from krona_hub.adapter import Adapter, LayerDelta
from krona_hub.conversion.dora import bake_dora
from krona_hub.conversion.forms import cast, form_of, is_lora, size_of
from krona_hub.conversion.layers import Outcome, apply_way, check_kind, only_loras_within
from krona_hub.conversion.report import REFUSED_ABOVE, ConversionReport, LayerReport
from krona_hub.conversion.target import Target, choose_target, default_out, default_way
from krona_hub.conversion.ways import Keep, Way, choose_way
from krona_hub.errors import LossyError
from krona_hub.formats.files import read
from krona_hub.formats.writing import parse_dtype, write
from krona_hub.kron.sums import measured_error, norm
from krona_hub.sources import resolve

Progress = Callable[[int, int], None]  # layers done, layers in all


def convert(
    source: str | Path,
    out: str | Path | None = None,
    *,
    to: str | None = None,
    tool: str | None = None,
    shape: str | tuple[int, int] | None = None,
    terms: int = 1,
    shape_fallback: str | None = None,
    max_error: float | None = None,
    budget: str | int | None = None,
    exact: bool = False,
    rank: int | None = None,
    base: str | Path | None = None,
    from_format: str | None = None,
    component: str | None = None,
    allow_loss: bool = False,
    allow_missing: bool = False,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    split_qkv: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert an adapter file or folder to another format, and say what it cost.

    `to` is a format of FORMATS, or `lora` or `lokr`; `tool` picks format, names and shapes for a program and
    keeps the kind. At most one of `shape`, `max_error`, `budget`, `exact` and `rank` says how; without one a
    LoRA becomes the smallest Kronecker form within 5 % per layer, and a Kronecker adapter stays what it is.
    Every error in the report is measured on the numbers that are written.

    Raises LossyError where the total relative error exceeds 0.5 (unless `allow_loss`), InexpressibleError
    where the target cannot hold a delta, and what `read` and `write` raise. Nothing is written in any of these cases.
    """
    asked = choose_way(
        shape=shape, terms=terms, shape_fallback=shape_fallback, max_error=max_error, budget=budget, exact=exact, rank=rank
    )
    path = resolve(source)
    adapter = read(path, base=base, format=from_format, component=component, allow_missing=allow_missing)
    target = choose_target(adapter, to=to, tool=tool, way=asked)
    way = asked if asked is not None else default_way(adapter, target)
    check_kind(way, target.to_lora, list(adapter.layers))
    adapter = bake_dora(adapter, target, way, base)
    outcomes = apply_way(adapter.layers, way, target.loads, target.to_lora, progress)
    if (stored := parse_dtype(dtype)) is not None:
        outcomes = {name: replace(o, delta=cast(o.delta, stored)) for name, o in outcomes.items()}
    report = ConversionReport(
        source=str(source),
        source_format=adapter.provenance.source_format or "",
        target_format=target.format,
        tool=tool,
        out=Path(out) if out is not None else default_out(path, target.format),
        layers=tuple(_layer_report(name, adapter.layers[name], outcomes[name]) for name in adapter.layers),
        notes=_notes(adapter, way),
    )
    if report.relative_error > REFUSED_ABOVE and not allow_loss:
        raise _refusal(report, adapter.layers)
    target.check(outcomes)
    if dry_run:
        return report
    converted = _converted(adapter, outcomes, report, way)
    written = write(
        converted, report.out, format=target.format, base=base, tool=tool, dtype=dtype, overwrite=overwrite,
        split_qkv=split_qkv,
    )  # fmt: skip
    return replace(
        report, checked=written.checked, written=True, files=written.files, notes=(*report.notes, *written.notes)
    )


def _layer_report(name: str, before: LayerDelta, outcome: Outcome) -> LayerReport:
    (p0, b0), (p1, b1) = size_of(before), size_of(outcome.delta)
    return LayerReport(
        layer=name,
        before=form_of(before),
        after=form_of(outcome.delta),
        parameters_before=p0,
        parameters_after=p1,
        bytes_before=b0,
        bytes_after=b1,
        relative_error=0.0 if outcome.delta is before else measured_error(outcome.delta.sums, before.sums),
        norm=norm(before.sums),
        note=outcome.note,
        best_other=outcome.best_other,
    )


def _converted(adapter: Adapter, outcomes: Mapping[str, Outcome], report: ConversionReport, way: Way) -> Adapter:
    errors = {x.layer: x.relative_error for x in report.layers if x.relative_error > 0}
    method = None if isinstance(way, Keep) else type(way).__name__
    provenance = replace(
        adapter.provenance, method=method, relative_error=report.relative_error if errors else None, layer_errors=errors
    )
    return replace(adapter, layers={n: o.delta for n, o in outcomes.items()}, provenance=provenance)


def _notes(adapter: Adapter, way: Way) -> tuple[str, ...]:
    notes = []
    if adapter.base is not None and adapter.base.family is None and adapter.base.candidates:
        notes.append(f"fits several bases: {', '.join(adapter.base.candidates)}; --base settles it")
    return tuple(notes)


def _refusal(report: ConversionReport, layers: Mapping[str, LayerDelta]) -> LossyError:
    """The refusal, with what else could be had, measured."""
    same_size = only_loras_within(layers, report.parameters_after)
    alternatives = (
        f"--exact keeps everything in {report.parameters_before:,} parameters",
        f"a LoRA of the same {report.parameters_after:,} parameters has error {same_size:.3f} "
        f"(--to lora --budget {report.parameters_after})",
        "--max-error 0.05 finds the smallest form within 5 % per layer",
    )
    return LossyError(
        f"the result would be {report.relative_error:.1%} error: {report.energy_kept:.1%} of the energy of the delta "
        "is kept. Nothing was written.",
        fix="; ".join(alternatives) + "; --allow-loss writes it anyway.",
    )
