"""`combine`: read, add, recompress where asked, measure, refuse or write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from krona_hub.adapter import Adapter, LayerDelta
from krona_hub.checkpoints.atomic import check_output
from krona_hub.checkpoints.digest import file_sha256
from krona_hub.combining.recompression import to_terms, within
from krona_hub.combining.report import CombineReport, Part
from krona_hub.combining.weighted import weighted_sum
from krona_hub.conversion.convert_file import parse_dtype
from krona_hub.conversion.forms import size_of, words_of
from krona_hub.conversion.layers import Outcome
from krona_hub.conversion.report import REFUSED_ABOVE, LayerReport
from krona_hub.conversion.target import FOLDERS, Target, format_named
from krona_hub.conversion.ways import choose_way
from krona_hub.errors import InexpressibleError, LossyError, UsageError
from krona_hub.formats.encode import cast
from krona_hub.formats.files import read
from krona_hub.formats.writing import write
from krona_hub.kron.parallel import in_parallel
from krona_hub.kron.sums import norm, relative_difference
from krona_hub.sources import resolve

Progress = Callable[[int, int], None]  # layers done, layers in all
Layers = Mapping[str, LayerDelta]


def combine(
    adapters: Sequence[tuple[Adapter | str | Path, float]],
    out: str | Path | None = None,
    *,
    terms: int | None = None,
    max_error: float | None = None,
    base: str | Path | None = None,
    to: str = "krona",
    component: str | None = None,
    dtype: str | torch.dtype | None = None,
    allow_loss: bool = False,
    allow_missing: bool = False,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> CombineReport:
    """One adapter that is the weighted sum of several: Σ weight · ΔW, exactly, with the union of their layers.

    Adapters may have any formats and shapes. `terms` or `max_error` makes the result smaller: the nearest sum of that
    many terms per layer, or the smallest form within that relative error; the error is measured on what is written.
    Without `out` nothing is written. Raises BaseMismatchError for adapters of different bases, UnsupportedError for
    DoRA layers that would have to be added, InexpressibleError where the format `to` cannot hold the sum, LossyError
    where the total error exceeds 0.5 (unless `allow_loss`), and what `read` and `write` raise.
    """
    _check_wish(terms, max_error)
    stored, target, path = parse_dtype(dtype), Target(format_named(to)), None if out is None else Path(out)
    if path is not None and target.format not in FOLDERS:
        check_output(path, overwrite=overwrite)
    loaded = [_loaded(source, base, component, allow_missing) for source, _ in adapters]
    weights = [float(weight) for _, weight in adapters]
    total = weighted_sum(list(zip(loaded, weights, strict=True)), allow_base_mismatch=allow_base_mismatch)
    outcomes = _recompressed(total.layers, terms, max_error, target, progress)
    outcomes = {name: replace(o, delta=cast(o.delta, stored)) for name, o in outcomes.items()}
    report = CombineReport(
        parts=tuple(_part(i, s, w, a) for i, ((s, _), w, a) in enumerate(zip(adapters, weights, loaded, strict=True))),
        target_format=target.format,
        out=path,
        layers=_layer_reports(total.layers, outcomes),
        notes=total.provenance.notes,
    )
    _check_loss(report, allow_loss)
    _check_expressible(target, outcomes)
    if path is None or dry_run:
        return report
    combined = _described(total, outcomes, report)
    written = write(combined, path, format=target.format, base=base, dtype=stored, overwrite=overwrite)
    notes = (*report.notes, *written.notes)
    return replace(report, checked=str(written), written=True, files=written.files, notes=notes)


def _check_wish(terms: int | None, max_error: float | None) -> None:
    if terms is not None and max_error is not None:
        raise UsageError("--terms and --max-error exclude each other.", fix="Give one of them.")
    if terms is not None and terms < 1:
        raise UsageError(f"--terms is {terms}.", fix="Give --terms a whole number from 1 up.")
    choose_way(max_error=max_error)


def _loaded(source: Adapter | str | Path, base: str | Path | None, component: str | None, partly: bool) -> Adapter:
    if isinstance(source, Adapter):
        return source
    return read(resolve(source), base=base, component=component, allow_missing=partly)


def _part(place: int, source: Adapter | str | Path, weight: float, adapter: Adapter) -> Part:
    path = None if isinstance(source, Adapter) else resolve(source)
    return Part(
        source=f"adapter {place + 1}" if isinstance(source, Adapter) else str(source),
        weight=weight,
        format=adapter.provenance.source_format,
        layers=len(adapter),
        parameters=sum(size_of(delta)[0] for delta in adapter.layers.values()),
        sha256=file_sha256(path) if path is not None and path.is_file() else None,
    )


def _recompressed(
    layers: Layers, terms: int | None, max_error: float | None, target: Target, progress: Progress | None
) -> dict[str, Outcome]:
    if terms is not None:
        return to_terms(layers, terms, progress)
    if max_error is not None:
        return within(layers, max_error, target, progress)
    return {name: Outcome(delta) for name, delta in layers.items()}


# --- measuring -------------------------------------------------------------------------------------------------------


def _layer_reports(exact: Layers, outcomes: Mapping[str, Outcome]) -> tuple[LayerReport, ...]:
    """One line per layer; norms only where some layer lost something, for that is all that they are needed for."""
    errors = dict(in_parallel(lambda name: _error(outcomes[name].delta, exact[name]), list(exact)))
    norms: dict[str, float] = {}
    if any(errors.values()):
        norms = dict(in_parallel(lambda name: norm(exact[name].sums), list(exact)))
    return tuple(_layer_report(n, exact[n], outcomes[n], errors[n], norms.get(n, 0.0)) for n in exact)


def _error(found: LayerDelta, meant: LayerDelta) -> float:
    return 0.0 if found.sums == meant.sums else relative_difference(found.sums, meant.sums)


def _layer_report(name: str, exact: LayerDelta, outcome: Outcome, error: float, norm: float) -> LayerReport:
    (p0, b0), (p1, b1) = size_of(exact), size_of(outcome.delta)
    return LayerReport(
        layer=name,
        before=words_of(exact),
        after=words_of(outcome.delta),
        parameters_before=p0,
        parameters_after=p1,
        bytes_before=b0,
        bytes_after=b1,
        relative_error=error,
        norm=norm,
        note=outcome.note,
        best_other=outcome.best_other,
    )


def _check_loss(report: CombineReport, allowed: bool) -> None:
    if report.relative_error > REFUSED_ABOVE and not allowed:
        raise LossyError(
            f"the result would be {report.relative_error:.1%} error, with {report.energy_kept:.1%} of the sum's energy "
            "kept; nothing was written.",
            fix=f"Without --terms and --max-error the sum is exact, in {report.parameters_before:,} parameters; "
            "--max-error 0.05 finds the smallest form within 5 % per layer; --allow-loss writes this one anyway.",
        )


def _check_expressible(target: Target, outcomes: Mapping[str, Outcome]) -> None:
    refusals = target.refusals({name: o.delta for name, o in outcomes.items()})
    if refusals:
        name, why = next(iter(refusals.items()))
        raise InexpressibleError(
            f"{len(refusals)} of {len(outcomes)} layers of the sum cannot be written as {target.format}; the first is "
            f"{name}: {why}.",
            fix="--to krona holds any sum exactly; --max-error 0.05 finds forms that this format holds, and --terms 1 "
            "takes one term per layer.",
        )


# --- the adapter to write --------------------------------------------------------------------------------------------


def _described(total: Adapter, outcomes: Mapping[str, Outcome], report: CombineReport) -> Adapter:
    """The result, with its parts and what was measured in its provenance."""
    errors = {x.layer: x.relative_error for x in report.layers if x.relative_error > 0}
    parts = " + ".join(f"{part.weight:g} · {Path(part.source).name}{_digest(part)}" for part in report.parts)
    provenance = replace(
        total.provenance,
        method=f"combined: {parts}",
        relative_error=report.relative_error if errors else None,
        layer_errors=errors,
    )
    return replace(total, layers={name: o.delta for name, o in outcomes.items()}, provenance=provenance)


def _digest(part: Part) -> str:
    return f" (sha256 {part.sha256})" if part.sha256 else ""
