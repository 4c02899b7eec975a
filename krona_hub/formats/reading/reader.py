"""Read any adapter: a source on disk → an `Adapter` with canonical layers and the scales folded into the factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from krona_hub.adapters.adapter import Adapter, BaseModel, LayerDelta, Provenance
from krona_hub.bases import catalog
from krona_hub.bases.base import Base
from krona_hub.bases.metadata_hints import BASE_KEYS
from krona_hub.bases.module_spec import Placement
from krona_hub.checkpoints.reader import load
from krona_hub.errors import SPECIFY_BASE, ConflictError, KronaError, UnknownBaseError
from krona_hub.formats.known.format import Format
from krona_hub.formats.known.native import KRONA
from krona_hub.formats.known.registry import by_name, detect_format
from krona_hub.formats.parsing import file_metadata
from krona_hub.formats.parsing.adapter_file import AdapterFile, in_file, open_files
from krona_hub.formats.reading.decode import decode, magnitude_of
from krona_hub.formats.reading.description import Description
from krona_hub.formats.reading.initial_factors import without_initial_factors
from krona_hub.formats.reading.kept_names import resolved
from krona_hub.formats.reading.placed_layers import joined, layer_of
from krona_hub.formats.reading.read_plan import ModulePlan, ReadPlan, make_plan, refuse
from krona_hub.formats.reading.values import minus_base, vectors_of
from krona_hub.kron.terms import KronTerms

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # exact in bfloat16, which has more bits of both kinds

__all__ = ["detect_format", "read", "read_described", "read_files", "read_planned"]


def read(
    source: str | Path,
    *,
    base: str | Path | Base | None = None,
    format: str | None = None,
    component: str | None = None,
    allow_missing: bool = False,
) -> Adapter:
    """Read an adapter of any supported format.

    Parameters
    ----------
    source : str or Path
        A `.safetensors` file, a PEFT folder, or a folder with one PEFT folder per component.
    base : str, Path or Base, optional
        Base model: a catalog name, a diffusers folder, a checkpoint file or a `Base`. Default: detect it; layers of
        an unknown base model are named `unknown.<module name of the file>`.
    format, component : str, optional
        Format name (see `FORMATS`) and component (such as `unet`), for files that leave them open.
    allow_missing : bool, default False
        Skip modules that are unknown, incomplete or of an unsupported algorithm, instead of raising.

    Returns
    -------
    Adapter
        Canonical layer name -> `LayerDelta`. Factors keep their stored dtype; the scale alpha / rank is folded into
        them, in at least float32.

    Raises
    ------
    KronaError
        A subclass such as `UnknownBaseError`, `AmbiguousError`, `IncompleteError`, `BaseMismatchError` or
        `NotFoundError`; the message names the file, the module and the fix.

    Examples
    --------
    >>> from importlib.resources import files
    >>> adapter = read(files("krona_hub.assets") / "zorbi_lokr.safetensors")
    >>> len(adapter), adapter.base.family, adapter.provenance.source_format
    (91, 'tiny-scenes', 'lycoris-lokr')
    """
    files = open_files(source, base)
    return read_files(files, str(source), format=format, component=component, allow_missing=allow_missing)


def read_files(
    files: Sequence[AdapterFile],
    source: str,
    *,
    format: str | None = None,
    component: str | None = None,
    allow_missing: bool = False,
) -> Adapter:
    """Read opened files as `read` does; `source` names them in errors."""
    known = by_name(format) if format is not None else None
    parts = [_read_file(f, known, f.component if len(files) > 1 else component, allow_missing) for f in files]
    return _joined(parts, source)


def read_described(about: Description, *, allow_missing: bool = False) -> Adapter:
    """Read the adapter of a description without planning again. Raises the errors of `read`."""
    if not about.plans:
        return read(about.path)
    for plan in about.plans:
        with in_file(plan.file.path):
            if plan.base_error is not None:
                raise plan.base_error
            refuse(plan, allow_missing)
    return read_planned(about.plans, str(about.path))


def read_planned(plans: Sequence[ReadPlan], source: str = "the adapter") -> Adapter:
    """Read the modules of these plans, ignoring their errors in `problems`. Raises errors of loading and decoding."""
    parts = []
    for plan in plans:
        with in_file(plan.file.path):
            parts.append(_execute(plan))
    return _joined(parts, source)


def _read_file(file: AdapterFile, known: Format | None, component: str | None, allow_missing: bool) -> Adapter:
    with in_file(file.path):
        known = known or detect_format(file)
        if known is KRONA:
            return _read_native(file)
        plan = make_plan(file, known, component)
        refuse(plan, allow_missing)
        return _execute(plan)


def _read_native(file: AdapterFile) -> Adapter:
    from krona_hub.schema.native_tensors import from_tensors

    adapter = from_tensors(file.header, load(file.header))
    if file.base is None:
        return adapter
    return replace(resolved(adapter, file.base), base=adapter.base or file.base.model)


def _execute(plan: ReadPlan) -> Adapter:
    keys = [key for m in plan.modules for key in m.group.keys]
    stored = load(plan.file.header, [*keys, *(vector.key.key for vector in plan.vectors)])
    tensors = {key: tensor.to(torch.bfloat16) if tensor.dtype in FP8 else tensor for key, tensor in stored.items()}
    pieces: dict[str, list[tuple[Placement, LayerDelta]]] = {}
    for module in plan.modules:
        parts = {part: tensors[key] for part, key in module.group.parts.items()}
        try:
            for place, delta in _placed(module, parts, plan):
                pieces.setdefault(place.layer, []).append((place, delta))
        except KronaError as error:
            raise error.within(module.group.name) from None
    layers = {layer: _joined_layer(layer, own, plan.match.base) for layer, own in pieces.items()}
    extras = load(plan.file.header, plan.file.keys.extras)
    return Adapter(layers, _base_model(plan), _provenance(plan), extras, vectors_of(plan, tensors))


def _placed(module: ModulePlan, parts: Mapping[str, Tensor], plan: ReadPlan) -> Iterator[tuple[Placement, LayerDelta]]:
    """Yield the deltas of the layers that one module of a file adapts, usually one."""
    terms = decode(parts, module.layout, module.scale.value)
    if module.scale.initial:
        terms = without_initial_factors(terms, module, plan.file.weights)
    magnitude = magnitude_of(parts)
    for place in module.places:
        delta = _delta(module, terms, magnitude, place, plan.match.base)
        yield place, minus_base(place, delta, plan.file.weights) if module.layout.kind == "value" else delta


def _joined_layer(layer: str, parts: Sequence[tuple[Placement, LayerDelta]], base: Base | None) -> LayerDelta:
    """The delta of a layer from those of the modules that it consists of, usually one."""
    module = base.module(layer) if base else None
    try:
        return joined(parts, module.shape if module else None)
    except KronaError as error:
        raise error.within(layer) from None


def _delta(
    module: ModulePlan, terms: KronTerms, magnitude: Tensor | None, place: Placement, base: Base | None
) -> LayerDelta:
    """The part of a module's delta that belongs to one layer."""
    known = base.module(place.layer) if base else None
    shape = known.shape if known and place.plain else module.layout.weight_shape
    if base is None and magnitude is not None and module.layout.dora == "in" and magnitude.numel() != shape[1]:
        raise UnknownBaseError(
            "The file does not state the kernel of this convolution, which the norms of its DoRA depend on.",
            fix=SPECIFY_BASE,
        )
    whole = LayerDelta((terms,), shape, magnitude, module.layout.dora or "out")
    return layer_of(whole, place, known.shape if known else None)


def _base_model(plan: ReadPlan) -> BaseModel | None:
    match = plan.match
    if match.base is None:
        return None
    model = match.base.model
    if len(match.candidates) < 2:
        return replace(model, candidates=())
    known = {catalog.get(name).fingerprint for name in match.candidates if catalog.find(name)}
    fingerprint = model.fingerprint if len(known) == 1 else None  # that of one of several is not known
    return replace(model, hub_id=None, fingerprint=fingerprint, candidates=match.candidates)


def _provenance(plan: ReadPlan) -> Provenance:
    known = plan.file.metadata
    vectors = {vector.key for vector in plan.file.keys.vectors}
    return Provenance(
        source_format=plan.format,
        training=file_metadata.training_record(known),
        licence=file_metadata.license_of(known),
        trigger_words=file_metadata.trigger_words(known),
        metadata={k: v for k, v in known.items() if not (plan.contradicted and k in BASE_KEYS)},
        skipped=tuple(name for name in plan.problems if name not in vectors),
        skipped_vectors=tuple(name for name in plan.problems if name in vectors),
        warnings=plan.notes,
        notes=(
            plan.matched,
            *plan.notes,
            *(f"skipped: {name}: {error.cause}" for name, error in plan.problems.items()),
        ),
    )


def _joined(parts: list[Adapter], source: str) -> Adapter:
    """One adapter from the parts of a folder, which adapt different components."""
    first, *rest = parts
    for other in rest:
        both = sorted(first.layers.keys() & other.layers.keys())
        if both:
            raise ConflictError(
                f"{source}: two of its folders adapt {both[0]}.",
                fix="Read a single subfolder, or name the subfolders by component (unet, text_encoder, …).",
            )
        one, two = first.provenance, other.provenance
        provenance = replace(
            one,
            notes=one.notes + two.notes,
            skipped=one.skipped + two.skipped,
            skipped_vectors=one.skipped_vectors + two.skipped_vectors,
            warnings=tuple(dict.fromkeys((*one.warnings, *two.warnings))),
        )
        first = replace(
            first,
            layers={**first.layers, **other.layers},
            base=first.base or other.base,
            extras={**first.extras, **other.extras},
            vectors={**first.vectors, **other.vectors},
            provenance=provenance,
        )
    return first
