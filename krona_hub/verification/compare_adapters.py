"""Compare two adapters, in any formats: the ΔW of layers through their factors, and vectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import inf, sqrt
from pathlib import Path

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.aliases import Progress
from krona_hub.bases.loading import weight_files
from krona_hub.conversion.bake_dora import plain_deltas
from krona_hub.errors import UnknownBaseError, abbreviated
from krona_hub.formats.forms.normal_forms import words_of
from krona_hub.formats.known.registry import format_of
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.readback import difference
from krona_hub.kron.norms import inner, norm
from krona_hub.kron.parallel import in_parallel
from krona_hub.sources import resolve
from krona_hub.verification.report import DeltaCheck, LayerCheck

Layers = Mapping[str, LayerDelta]


def same_delta(
    first: str | Path,
    second: str | Path,
    base: str | Path | None = None,
    tolerance: float = 1e-5,
    component: str | None = None,
    allow_missing: bool = False,
    progress: Progress | None = None,
) -> DeltaCheck:
    """Read and compare two adapters. Raises what reading them and `compare_deltas` raise."""
    paths = resolve(first), resolve(second)
    one, two = (read(x, base=base, component=component, allow_missing=allow_missing) for x in paths)
    formats = format_of(paths[0], base), format_of(paths[1], base)
    return replace(
        compare_deltas(one, two, base, tolerance, progress), first=str(first), second=str(second), formats=formats
    )


def compare_deltas(
    one: Adapter,
    two: Adapter,
    base: str | Path | None = None,
    tolerance: float = 1e-5,
    progress: Progress | None = None,
) -> DeltaCheck:
    """Check whether ‖ΔW₂ − ΔW₁‖ ≤ tolerance · ‖ΔW₁‖ in every layer and vector; what only one has must be zero.

    Raises UnknownBaseError if a DoRA is compared with a plain delta and `base` has no weights.
    """
    a, b = _comparable(_deltas(one), _deltas(two), base)
    names, vectors = sorted(a.keys() | b.keys()), one.vectors.keys() | two.vectors.keys()
    checks: list[LayerCheck] = []
    for _, check in in_parallel(lambda name: _check(name, a.get(name), b.get(name), tolerance), names):
        checks.append(check)
        if progress:
            progress(len(checks), len(names))
    scale, cosine = (None, None) if all(c.same for c in checks) else _alignment(a, b)
    return DeltaCheck(
        first="the first adapter",
        second="the second adapter",
        formats=(one.provenance.source_format, two.provenance.source_format),
        tolerance=tolerance,
        layers=tuple(c for c in checks if c.layer not in vectors),
        vectors=tuple(c for c in checks if c.layer in vectors),
        scale=scale,
        cosine=cosine,
        notes=tuple(_notes(one, two, checks)),
        skipped=tuple(name for p in (one.provenance, two.provenance) for name in (*p.skipped, *p.skipped_vectors)),
    )


def _deltas(adapter: Adapter) -> Layers:
    """Return the deltas of the layers and, by the names of their parameters, those of the vectors."""
    return {**adapter.layers, **{name: adapter.delta(name) for name in adapter.vectors}}


def _comparable(one: Layers, two: Layers, base: str | Path | None) -> tuple[Layers, Layers]:
    """Return both with DoRA layers as plain deltas, if base weights are given or only one of them is a DoRA."""
    doras = {name for layers in (one, two) for name, d in layers.items() if d.magnitude is not None}
    unlike = sorted(name for name in doras if not (_is_dora(one, name) and _is_dora(two, name)))
    if not doras or not (unlike or (base is not None and weight_files(base))):
        return one, two
    if base is None:
        raise UnknownBaseError(
            f"{unlike[0]} is a DoRA in only one of the adapters; comparing them requires the base weights.",
            fix="Specify the base model with --base (a diffusers folder or a checkpoint file with weights).",
        )
    return _plain(one, base), _plain(two, base)


def _is_dora(layers: Layers, name: str) -> bool:
    return name in layers and layers[name].magnitude is not None


def _plain(layers: Layers, base: str | Path) -> Layers:
    return {**layers, **plain_deltas({n: d for n, d in layers.items() if d.magnitude is not None}, base)}


def _check(name: str, one: LayerDelta | None, two: LayerDelta | None, tolerance: float) -> LayerCheck:
    relative, whole, apart = _measured(one, two)
    return LayerCheck(
        layer=name,
        first=None if one is None else words_of(one),
        second=None if two is None else words_of(two),
        relative_difference=relative,
        norm=whole,
        difference=apart,
        same=relative <= tolerance,
    )


def _measured(one: LayerDelta | None, two: LayerDelta | None) -> tuple[float, float, float]:
    """Return ‖ΔW₂ − ΔW₁‖ / ‖ΔW₁‖, ‖ΔW₁‖ and ‖ΔW₂ − ΔW₁‖; a missing layer counts as zero."""
    whole = 0.0 if one is None else norm(one.sums)
    if one is None or two is None or one.matrix_shape != two.matrix_shape:
        other = 0.0 if two is None else norm(two.sums)
        apart = sqrt(whole**2 + other**2)
        sized_alike = one is None or two is None
        return (_ratio(apart, whole) if sized_alike else inf), whole, apart
    relative = difference(two, one)
    return relative, whole, norm(two.sums) if relative == inf else relative * whole


def _ratio(apart: float, whole: float) -> float:
    return 0.0 if not apart else (apart / whole if whole else inf)


def _alignment(one: Layers, two: Layers) -> tuple[float | None, float | None]:
    """Return the scale s that brings s·ΔW₁ nearest to ΔW₂, and the cosine of the two, over all layers."""
    common = [n for n in one.keys() & two.keys() if one[n].matrix_shape == two[n].matrix_shape]
    product = sum(x for _, x in in_parallel(lambda n: inner(one[n].sums, two[n].sums), common))
    whole, other = (sum(norm(d.sums) ** 2 for d in layers.values()) for layers in (one, two))
    if not whole or not other:
        return None, None
    return product / whole, product / sqrt(whole * other)


def _notes(one: Adapter, two: Adapter, checks: Iterable[LayerCheck]) -> Iterable[str]:
    sizes = [c.layer for c in checks if c.relative_difference == inf and c.first and c.second and c.norm]
    if sizes:
        yield f"{abbreviated(sizes)}: different sizes in the two adapters"
    extras = sorted(one.extras.keys() ^ two.extras.keys())
    if extras:
        yield f"{abbreviated(extras)}: only in the extras of one adapter; extras are not part of ΔW and not compared"
