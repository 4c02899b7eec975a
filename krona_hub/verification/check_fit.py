"""Check whether an adapter fits a base model: names and shapes, from headers alone. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

from krona_hub.adapters.provenance import BaseModel
from krona_hub.bases.base import Base
from krona_hub.bases.loading import load_base
from krona_hub.errors import AmbiguousError, BaseMismatchError, KronaError, UnknownBaseError
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.description import Description, ModuleInfo, VectorInfo
from krona_hub.schema import tensor_layout
from krona_hub.schema.tensor_layout import is_native
from krona_hub.sources import resolve
from krona_hub.verification.report import FitCheck

OPEN = (AmbiguousError, BaseMismatchError, UnknownBaseError)  # errors of a base that does not fit


def fits(source: str | Path, base: str | Path, component: str | None = None) -> FitCheck:
    """Check whether `base` has every layer of the adapter at `source`, with its shape.

    Raises NotFoundError if `source` does not exist, UnknownBaseError if `base` is unknown, and what `describe` raises
    for a file that is not an adapter.
    """
    path, known = resolve(source), load_base(base)
    about = _described(path, known, component)
    problems = dict(_problems(about, known))
    vector_keys = {vector.key for plan in about.plans for vector in plan.file.keys.vectors}
    unmatched = [name for name in about.unmatched if name not in vector_keys]
    adapted = {layer for m in about.modules if m.name not in problems for layer in m.layers}
    recorded = _recorded(about)
    check = FitCheck(
        adapter=path,
        base=known.name,
        format=about.format,
        matched=len(about.modules) - sum(m.name in problems for m in about.modules),
        total=len(about.modules) + len(unmatched),
        matched_vectors=len(about.vectors) - sum(v.name in problems for v in about.vectors),
        total_vectors=len(about.vectors) + len(about.unmatched) - len(unmatched),
        problems=problems,
        coverage=_coverage(adapted, known),
        recorded=recorded.words if recorded else about.training.get("base"),
        fingerprint_agrees=_agrees(recorded, known),
        notes=about.warnings if not problems else (),
    )
    return check if check.same else replace(check, fits_instead=_fits_instead(path, component, known))


def _described(path: Path, base: Base, component: str | None) -> Description:
    """Describe the adapter with `base`, or without it if the base leaves even the format ambiguous."""
    try:
        return describe(path, base=base, component=component)
    except OPEN as error:
        try:
            return describe(path, component=component)
        except KronaError:
            raise error from None


def _problems(about: Description, base: Base) -> Iterator[tuple[str, str]]:
    """Yield modules and vectors, and why they do not fit."""
    yield from about.unmatched.items()
    for module in about.modules:
        why = _why_not(module, base)
        if why:
            yield module.name, why
    for vector in about.vectors:
        why = _why_not_added(vector, base)
        if why:
            yield vector.name, why


def _why_not_added(vector: VectorInfo, base: Base) -> str | None:
    shapes = {name: base.parameter(name) for name in vector.parameters}
    lacking = next((name for name, shape in shapes.items() if shape is None), None)
    if lacking is not None:
        return f"{base.name} has no {lacking}."
    size = sum(prod(shape) for shape in shapes.values() if shape is not None)
    if size == vector.values or not vector.whole:
        return None
    return f"it has {vector.values} values, but {base.name} has {size}."


def _why_not(module: ModuleInfo, base: Base) -> str | None:
    if not module.layers:
        return f"{base.name} has no module of this name."
    for layer in module.layers:
        known = base.module(layer)
        if known is None:
            return f"{base.name} has no {layer}."
        rows = module.part[1] - module.part[0] if module.part else known.matrix[0]
        ours, theirs = _size(module.weight_shape), (rows, known.matrix[1])
        if len(module.layers) == 1 and ours != theirs:
            return f"its delta is {ours[0]}x{ours[1]}, but the weight in {base.name} is {theirs[0]}x{theirs[1]}."
    return None


def _size(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (out, in·k…)."""
    columns = 1
    for n in shape[1:]:
        columns *= n
    return shape[0], columns


def _coverage(adapted: Iterable[str], base: Base) -> dict[str, tuple[int, int]]:
    """Return, per component, the number of adapted layers and of all layers."""
    owners = [layer.partition(".")[0] for layer in adapted]
    return {c: (owners.count(c), len(modules)) for c, modules in base.components.items() if c in owners}


def _recorded(about: Description) -> BaseModel | None:
    """Return the base model that a native file records."""
    return tensor_layout.examine(about.header)[0].header.base if is_native(about.header.metadata) else None


def _agrees(recorded: BaseModel | None, base: Base) -> bool | None:
    """Compare as a merge does: names take precedence over fingerprints. None if nothing is recorded."""
    return None if recorded is None else recorded.agrees_with(base.model)


def _fits_instead(path: Path, component: str | None, base: Base) -> tuple[str, ...]:
    """Return other catalog names that the adapter fits."""
    try:
        about = describe(path, component=component)
    except KronaError:
        return ()
    whole = not about.unmatched and about.base is not None and all(m.layers for m in about.modules)
    names = (about.candidates or (about.base,)) if whole and about.base else ()
    return tuple(name for name in names if name not in (base.name, base.family))
