"""Measure the layers of a result: what a reader of the file finds, against what it should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.bases.loading import read, weight_files
from krona_hub.conversion.convert_layers import ConvertedLayer, error_of, layer_report
from krona_hub.conversion.report import LayerReport
from krona_hub.errors import counted
from krona_hub.formats.writing.readback import difference
from krona_hub.kron.norms import norm
from krona_hub.kron.parallel import in_parallel

Layers = Mapping[str, LayerDelta]


def measured_layers(
    before: Layers,
    reference: Layers,
    outcomes: Mapping[str, ConvertedLayer],
    stored: Layers,
    base: str | Path | None,
) -> tuple[tuple[LayerReport, ...], tuple[str, ...]]:
    """Return the reports of all layers, `stored` against `reference`, what `before` stands for, and notes on them.

    A layer that was left out is not stored, and loses all of its norm.
    The two differ for DoRA layers that were merged. The delta of one that kept its magnitude depends on its weight in
    `base`: without it, the error is that of the factors or of the magnitude, whichever is larger.
    """
    doras = [name for name, delta in reference.items() if delta.magnitude is not None]
    rounded = [n for n in doras if not outcomes[n].is_left_out and difference(stored[n], reference[n]) > 0]
    places = weight_files(base) if rounded and base is not None else {}

    def measured(name: str) -> LayerReport:
        exact, outcome = reference[name], outcomes[name]
        if outcome.is_left_out:
            size = norm(exact.sums)
            return layer_report(name, before[name], outcome, outcome.delta, 1.0 if size else 0.0, size)
        found = stored[name]
        weight = read(places[name]) if exact.magnitude is not None and name in places else None
        error, size = _error_and_norm(found, exact, weight)
        return layer_report(name, before[name], outcome, found, error, size)

    reports = tuple(report for _, report in in_parallel(measured, list(reference)))
    return reports, _note([name for name in rounded if name not in places])


def _error_and_norm(found: LayerDelta, exact: LayerDelta, weight: Tensor | None) -> tuple[float, float]:
    """The relative error, and the norm that it is relative to."""
    if exact.magnitude is None:
        return error_of(found, exact), norm(exact.sums)
    if weight is None:
        return difference(found, exact), norm(exact.sums)
    now, meant = (delta.map(Tensor.double).dense(weight.double()) for delta in (found, exact))
    lost, size = float((now - meant).norm()), float(meant.norm())
    return (lost / size if size else float("inf") if lost else 0.0), size


def _note(unmeasured: Sequence[str]) -> tuple[str, ...]:
    if not unmeasured:
        return ()
    layers = counted(len(unmeasured), "DoRA layer")
    return (f"the error of {layers} is that of the stored numbers: that of the delta depends on base weights (--base)",)
