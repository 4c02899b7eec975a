"""The weighted sum of adapters as one adapter: factors are concatenated and weights folded in, without averaging.

    Σᵢ wᵢ·ΔWᵢ     a layer keeps one Kronecker sum per shape; sums of one shape become one with more terms

    Σᵢ wᵢ·vᵢ      vectors, those of biases and norms, are added up; an adapter without one counts as 0

The result never has more parameters than its parts together, whatever their shapes: a layer can hold several sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.adapters.provenance import BaseModel, Provenance
from krona_hub.adapters.unknown_base import UNKNOWN
from krona_hub.errors import BaseMismatchError, KronaError, UnsupportedError, UsageError, abbreviated
from krona_hub.formats.forms.normal_forms import lora_of, without_hadamard
from krona_hub.kron.terms import Factor, KronTerms, LowRank, as_lora, stored_rank


class WeightedAdapter(NamedTuple):
    """One part of a sum."""

    weight: float
    delta: LayerDelta


def weighted_sum(adapters: Sequence[tuple[Adapter, float]], *, allow_base_mismatch: bool = False) -> Adapter:
    """Return Σ weight · adapter as one adapter: the union of the layers, with concatenated factors, and of the vectors.

    Weights may have any sign; a layer whose parts cancel or have weight 0 stays, as a zero delta. Extras of the same
    name are not added: that of the first adapter is taken. `provenance.notes` lists what users should know. Raises
    BaseMismatchError if base models (unless `allow_base_mismatch`) or shapes differ, UnsupportedError for DoRA layers
    that would have to be added or scaled.

    >>> from krona_hub.kron.terms import KronTerms
    >>> layer = LayerDelta((KronTerms(torch.ones(1, 2, 2), torch.ones(1, 4, 3)),), (8, 6))
    >>> both = weighted_sum([(Adapter({"unet.x": layer}), 2.0), (Adapter({"unet.x": layer}), -0.5)])
    >>> float(both["unet.x"].dense()[0, 0]), both.parameters == layer.parameters
    (1.5, True)
    """
    _check_weights([weight for _, weight in adapters])
    base = common_base([a.base for a, _ in adapters], allow_mismatch=allow_base_mismatch)
    _check_known(base, [a for a, _ in adapters], allow_mismatch=allow_base_mismatch)
    parts: dict[str, list[WeightedAdapter]] = {}
    for adapter, weight in adapters:
        for name, delta in adapter.layers.items():
            parts.setdefault(name, []).append(WeightedAdapter(weight, delta))
    layers = {name: _within(name, own) for name, own in parts.items()}
    vectors = _vectors(adapters)
    extras, differing = _extras(adapters)
    notes = (*_notes(parts, layers, len(adapters)), *_differing(differing))
    return Adapter(layers, base, _provenance([a.provenance for a, _ in adapters], notes), extras, vectors)


def _check_known(base: BaseModel | None, adapters: Sequence[Adapter], *, allow_mismatch: bool) -> None:
    """Raise BaseMismatchError for the layers of an unknown base model beside those of a known one."""
    if base is not None and not allow_mismatch and any(UNKNOWN in adapter.components for adapter in adapters):
        raise BaseMismatchError(
            f"One adapter is for {base.words}, and the base model of another is unknown.",
            fix="Combine adapters of one base model, or specify it with --base.",
        )


def _check_weights(weights: Sequence[float]) -> None:
    if not weights:
        raise UsageError("Missing adapters to combine.", fix="Specify at least one, with its weight: A:0.8 B:0.5.")
    wrong = [w for w in weights if not isfinite(w)]
    if wrong:
        raise UsageError(f"Invalid weight {wrong[0]}.", fix="Use a finite number, such as 0.8 or -1.")


# --- one layer -------------------------------------------------------------------------------------------------------


def _within(name: str, parts: Sequence[WeightedAdapter]) -> LayerDelta:
    try:
        return _layer_sum(parts)
    except KronaError as error:
        raise error.within(name) from None


def _layer_sum(parts: Sequence[WeightedAdapter]) -> LayerDelta:
    """Return Σ weight · delta of one layer."""
    shape = _common_shape([p.delta for p in parts])
    present = [p for p in parts if p.weight]
    if any(p.delta.magnitude is not None for p in present):
        return _only_dora(present)
    deltas = [(p.weight, without_hadamard(p.delta, to_lora=True)) for p in present]
    pairs = _merge_equal([(weight, s) for weight, delta in deltas for s in delta.sums])
    sums = [s if weight == 1 else s.scaled(weight) for weight, s in pairs]
    return LayerDelta(stacked(sums), shape)


def _common_shape(deltas: Sequence[LayerDelta]) -> tuple[int, ...]:
    """Return the shape of the weight, with the kernel of a convolution if any of the files records it."""
    sizes = {d.matrix_shape for d in deltas}
    if len(sizes) > 1:
        raise BaseMismatchError(
            f"The adapters have different matrix sizes, {' and '.join(map(str, sorted(sizes)))}.",
            fix="Combine adapters of the same base model.",
        )
    return max((d.weight_shape for d in deltas), key=len)


def _only_dora(parts: Sequence[WeightedAdapter]) -> LayerDelta:
    """Return a single DoRA at strength 1 unchanged; its delta depends on the base weight, so it cannot be added."""
    if len(parts) == 1 and parts[0].weight == 1:
        return without_hadamard(parts[0].delta)
    raise UnsupportedError(
        "A DoRA layer cannot be scaled or added to another layer: its delta depends on the base weights.",
        fix="Convert it to a plain delta first: krona convert FILE --exact --base BASE.",
    )


def _merge_equal(pairs: Sequence[tuple[float, KronTerms]]) -> list[tuple[float, KronTerms]]:
    """Merge equal sums by adding their weights, and drop those with weight 0."""
    kept: list[tuple[float, KronTerms]] = []
    for weight, s in pairs:
        at = next((i for i, (_, other) in enumerate(kept) if _equal(s, other)), None)
        if at is None:
            kept.append((weight, s))
        else:
            kept[at] = (kept[at][0] + weight, s)
    return [(weight, s) for weight, s in kept if weight]


def _equal(a: KronTerms, b: KronTerms) -> bool:
    if a.shape != b.shape or a.rows != b.rows or len(a.tensors) != len(b.tensors):
        return False
    return all(x.shape == y.shape and bool((x == y).all()) for x, y in zip(a.tensors, b.tensors, strict=True))


def stacked(sums: Sequence[KronTerms]) -> tuple[KronTerms, ...]:
    """Concatenate the sums of one shape and structure: LoRAs along the rank, others along the terms.

    >>> a, b = (as_lora(torch.ones(4, r), torch.ones(r, 6)) for r in (2, 3))
    >>> [s.right.rank for s in stacked([a, b])]
    [5]
    """
    groups: dict[object, list[KronTerms]] = {}
    for s in sums:
        groups.setdefault(_structure(s), []).append(s)
    return tuple(_joined(group) for group in groups.values())


def _structure(s: KronTerms) -> object:
    """Return the key that sums must share to be joined: for non-LoRAs the shape, row order and stored ranks."""
    if _is_lora(s):
        return "LoRA"
    return s.shape, s.rows, *map(stored_rank, (s.left, s.right))


def _is_lora(s: KronTerms) -> bool:
    return s.shape[:2] == (1, 1) and isinstance(s.left, Tensor) and isinstance(s.right, LowRank)


def _joined(group: Sequence[KronTerms]) -> KronTerms:
    first = group[0]
    if len(group) == 1:
        return first
    lora = lora_of(LayerDelta(tuple(group), first.shape.full)) if _is_lora(first) else None
    if lora is not None:
        return as_lora(*lora)
    return KronTerms(_cat([s.left for s in group]), _cat([s.right for s in group]), first.rows)


def _cat(factors: Sequence[Factor]) -> Factor:
    """Concatenate stacks of one structure, in the widest of their dtypes."""
    products = [f for f in factors if isinstance(f, LowRank)]
    if products:
        return LowRank(torch.cat([p.up for p in products]), torch.cat([p.down for p in products]))
    return torch.cat([f for f in factors if isinstance(f, Tensor)])


# --- vectors ---------------------------------------------------------------------------------------------------------


def _vectors(adapters: Sequence[tuple[Adapter, float]]) -> dict[str, Tensor]:
    """Return Σ weight · vector of every parameter. Raises BaseMismatchError if the shapes of one differ."""
    parts: dict[str, list[tuple[float, Tensor]]] = {}
    for adapter, weight in adapters:
        for name, vector in adapter.vectors.items():
            parts.setdefault(name, []).append((weight, vector))
    return {name: _vector_sum(name, own) for name, own in parts.items()}


def _vector_sum(name: str, parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Add in float64 and round once to float32; a single vector at weight 1 keeps its dtype."""
    shapes = {tuple(vector.shape) for _, vector in parts}
    if len(shapes) > 1:
        raise BaseMismatchError(
            f"{name}: The adapters have vectors of different shapes, {' and '.join(map(str, sorted(shapes)))}.",
            fix="Combine adapters of the same base model.",
        )
    (weight, first), *others = parts
    if weight == 1 and not others:
        return first
    dtype = reduce(torch.promote_types, (vector.dtype for _, vector in parts), torch.float32)
    return sum((w * vector.double() for w, vector in others), weight * first.double()).to(dtype)


# --- extras and provenance -------------------------------------------------------------------------------------------


def _extras(adapters: Sequence[tuple[Adapter, float]]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the embeddings of all adapters, the first of equal names, and the names of those that differ."""
    extras: dict[str, Tensor] = {}
    differing = []
    for adapter, _ in adapters:
        for name, tensor in adapter.extras.items():
            if not torch.equal(extras.setdefault(name, tensor), tensor):
                differing.append(name)
    return extras, differing


def _differing(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (
        f"{abbreviated(names)}: the extras of the adapters contain different tensors of this name; the first is kept",
    )


def _notes(
    parts: Mapping[str, Sequence[WeightedAdapter]], layers: Mapping[str, LayerDelta], adapters: int
) -> tuple[str, ...]:
    zero = [name for name, delta in layers.items() if not delta.sums and delta.magnitude is None]
    notes = []
    if zero:
        notes.append(f"{len(zero)} of {len(layers)} layers are zero: their parts cancel or have strength 0")
    if adapters > 1 and parts and all(len(own) == 1 for own in parts.values()):
        notes.append("the adapters have no layers in common")
    return tuple(notes)


def _provenance(parts: Sequence[Provenance], notes: tuple[str, ...]) -> Provenance:
    """Return the metadata that all adapters share, with the trigger words of any."""
    first = parts[0].metadata
    shared = {key: text for key, text in first.items() if all(p.metadata.get(key) == text for p in parts)}
    licences = list(dict.fromkeys(p.licence for p in parts if p.licence))
    return Provenance(
        method="weighted sum",
        licence=" AND ".join(licences) or None,
        trigger_words=tuple(dict.fromkeys(w for p in parts for w in p.trigger_words)),
        metadata=shared,
        skipped=tuple(dict.fromkeys(name for p in parts for name in p.skipped)),
        skipped_vectors=tuple(dict.fromkeys(name for p in parts for name in p.skipped_vectors)),
        notes=notes,
    )


def common_base(bases: Sequence[BaseModel | None], *, allow_mismatch: bool = False) -> BaseModel | None:
    """Return the base model compatible with all of them, as narrow as known; None if none is known.

    Unknown base models agree with everything. Raises BaseMismatchError if two differ, unless `allow_mismatch`: then
    the first one is used.

    >>> common_base([BaseModel("sd21", candidates=("sd21", "sd21-base")), None, BaseModel("sd21-base")]).family
    'sd21-base'
    """
    known = [base for base in bases if base is not None]
    if not known:
        return None
    common = known[0]
    for other in known[1:]:
        if common.agrees_with(other):
            common = _narrowed(common, other)
        elif not allow_mismatch:
            raise BaseMismatchError(
                f"One adapter is for {common.words} and another for {other.words}.",
                fix="Combine adapters of one base model, or add --allow-base-mismatch to combine layers with the same "
                "names and shapes.",
            )
    return common


def _narrowed(a: BaseModel, b: BaseModel) -> BaseModel:
    """Return what both allow, with the fields that only one of them records."""
    family, candidates = a.family or b.family, a.candidates or b.candidates
    if a.family and b.family:
        names = sorted({*a.names} & {*b.names}) or [a.family]
        family = a.family if a.family in names else names[0]
        candidates = tuple(names) if len(names) > 1 else ()
    same = a.hub_id == b.hub_id
    return replace(
        a,
        family=family,
        candidates=candidates,
        fingerprint=a.fingerprint or b.fingerprint,
        hub_id=a.hub_id or b.hub_id,
        revision=a.revision if same and a.revision == b.revision else None,
    )
