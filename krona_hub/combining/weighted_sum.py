"""The weighted sum of adapters as an adapter: their factors side by side, the weights folded in, nothing averaged.

    Σᵢ wᵢ·ΔWᵢ     a layer keeps one Kronecker sum per shape; sums of one shape become one with more terms

The result has no more parameters than its parts together, whatever their shapes: a layer holds several sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.adapters.provenance import BaseModel, Provenance
from krona_hub.errors import BaseMismatchError, KronaError, UnsupportedError, UsageError, abbreviated
from krona_hub.formats.forms.normal_forms import lora_of
from krona_hub.formats.parsing.keys import split_key
from krona_hub.kron.terms import Factor, KronTerms, LowRank, as_lora, stored_rank


class WeightedAdapter(NamedTuple):
    """One part of a sum."""

    weight: float
    delta: LayerDelta


def weighted_sum(adapters: Sequence[tuple[Adapter, float]], *, allow_base_mismatch: bool = False) -> Adapter:
    """Σ weight · adapter as one adapter, exactly: the union of the layers, the factors of each side by side.

    Weights may have any sign; a layer whose parts cancel or have weight 0 stays, as a delta of nothing. Biases and
    norms in the extras are added too; other extras of one name are kept from the first adapter that has them.
    `provenance.notes` tells what a person should know. Raises BaseMismatchError where bases or shapes differ (
    `allow_base_mismatch` consents to bases), UnsupportedError for DoRA layers that would have to be added or scaled.

    >>> from krona_hub.kron.terms import KronTerms
    >>> layer = LayerDelta((KronTerms(torch.ones(1, 2, 2), torch.ones(1, 4, 3)),), (8, 6))
    >>> both = weighted_sum([(Adapter({"unet.x": layer}), 2.0), (Adapter({"unet.x": layer}), -0.5)])
    >>> float(both["unet.x"].dense()[0, 0]), both.parameters == layer.parameters
    (1.5, True)
    """
    _check_weights([weight for _, weight in adapters])
    base = common_base([a.base for a, _ in adapters], allow_mismatch=allow_base_mismatch)
    parts: dict[str, list[WeightedAdapter]] = {}
    for adapter, weight in adapters:
        for name, delta in adapter.layers.items():
            parts.setdefault(name, []).append(WeightedAdapter(weight, delta))
    layers = {name: _within(name, own) for name, own in parts.items()}
    extras, differing = _extras(adapters)
    notes = (*_notes(parts, layers, len(adapters)), *_differing(differing))
    return Adapter(layers, base, _provenance([a.provenance for a, _ in adapters], notes), extras)


def _check_weights(weights: Sequence[float]) -> None:
    if not weights:
        raise UsageError("there is no adapter to combine.", fix="Name one or more, each with its weight: A:0.8 B:0.5.")
    wrong = [w for w in weights if not isfinite(w)]
    if wrong:
        raise UsageError(f"{wrong[0]} is no weight.", fix="Give a finite number, such as 0.8 or -1.")


# --- one layer -------------------------------------------------------------------------------------------------------


def _within(name: str, parts: Sequence[WeightedAdapter]) -> LayerDelta:
    try:
        return _layer_sum(parts)
    except KronaError as error:
        raise error.within(name) from None


def _layer_sum(parts: Sequence[WeightedAdapter]) -> LayerDelta:
    """Σ weight · delta of one layer."""
    shape = _common_shape([p.delta for p in parts])
    present = [p for p in parts if p.weight]
    if any(p.delta.magnitude is not None for p in present):
        return _only_dora(present)
    pairs = _equal_ones_once([(p.weight, s) for p in present for s in p.delta.sums])
    sums = [s if weight == 1 else s.scaled(weight) for weight, s in pairs]
    return LayerDelta(stacked(sums), shape)


def _common_shape(deltas: Sequence[LayerDelta]) -> tuple[int, ...]:
    """The shape of the weight; that of a convolution where another file knows its matrix only."""
    sizes = {d.matrix_shape for d in deltas}
    if len(sizes) > 1:
        raise BaseMismatchError(
            f"the adapters are for weights of different sizes, {' and '.join(map(str, sorted(sizes)))}.",
            fix="They belong to different bases: combine adapters of one base.",
        )
    return max((d.weight_shape for d in deltas), key=len)


def _only_dora(parts: Sequence[WeightedAdapter]) -> LayerDelta:
    """A DoRA alone and at full strength is itself; its delta depends on the base weight, so nothing can be added."""
    if len(parts) == 1 and parts[0].weight == 1:
        return parts[0].delta
    raise UnsupportedError(
        "a DoRA layer cannot be scaled or added to another: its delta depends on the base weights.",
        fix="Make a plain delta of it first: krona convert FILE --exact --base BASE, with the weights of the base.",
    )


def _equal_ones_once(pairs: Sequence[tuple[float, KronTerms]]) -> list[tuple[float, KronTerms]]:
    """Sums that are number for number the same, once, with their weights added; without those of weight 0."""
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
    """The same sums with those of one shape and structure joined into one: LoRAs by rank, others by terms.

    >>> a, b = (as_lora(torch.ones(4, r), torch.ones(r, 6)) for r in (2, 3))
    >>> [s.right.rank for s in stacked([a, b])]
    [5]
    """
    groups: dict[object, list[KronTerms]] = {}
    for s in sums:
        groups.setdefault(_structure(s), []).append(s)
    return tuple(_joined(group) for group in groups.values())


def _structure(s: KronTerms) -> object:
    """What two sums must share to become one: for LoRAs nothing else, for others shape, order of rows and ranks."""
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
    """Stacks of one structure as one longer stack, in the widest of their types."""
    products = [f for f in factors if isinstance(f, LowRank)]
    if products:
        return LowRank(torch.cat([p.up for p in products]), torch.cat([p.down for p in products]))
    return torch.cat([f for f in factors if isinstance(f, Tensor)])


# --- what is no layer ------------------------------------------------------------------------------------------------


def _extras(adapters: Sequence[tuple[Adapter, float]]) -> tuple[dict[str, Tensor], list[str]]:
    """The extras of all, and the names of those that differ. Differences of biases and norms are added."""
    extras: dict[str, Tensor] = {}
    differing = []
    for adapter, weight in adapters:
        for name, tensor in adapter.extras.items():
            adds_up = split_key(name) is not None
            tensor = tensor.float() * weight if adds_up and weight != 1 else tensor
            if name not in extras:
                extras[name] = tensor
            elif adds_up and extras[name].shape == tensor.shape:
                extras[name] = extras[name].float() + tensor
            elif not torch.equal(extras[name], tensor):
                differing.append(name)
    return extras, differing


def _differing(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (
        f"{abbreviated(names)}: the adapters hold different tensors of this name in their extras; the first is kept",
    )


def _notes(
    parts: Mapping[str, Sequence[WeightedAdapter]], layers: Mapping[str, LayerDelta], adapters: int
) -> tuple[str, ...]:
    zero = [name for name, delta in layers.items() if not delta.sums and delta.magnitude is None]
    notes = []
    if zero:
        notes.append(f"{len(zero)} of {len(layers)} layers come to nothing: their parts cancel or have weight 0")
    if adapters > 1 and all(len(own) == 1 for own in parts.values()):
        notes.append("the adapters have no layer in common")
    return tuple(notes)


def _provenance(parts: Sequence[Provenance], notes: tuple[str, ...]) -> Provenance:
    """What all of them say; trigger words of any."""
    first = parts[0].metadata
    shared = {key: text for key, text in first.items() if all(p.metadata.get(key) == text for p in parts)}
    licences = list(dict.fromkeys(p.licence for p in parts if p.licence))
    return Provenance(
        method="weighted sum",
        licence=" AND ".join(licences) or None,
        trigger_words=tuple(dict.fromkeys(w for p in parts for w in p.trigger_words)),
        metadata=shared,
        notes=notes,
    )


def common_base(bases: Sequence[BaseModel | None], *, allow_mismatch: bool = False) -> BaseModel | None:
    """The base that all of them may be, as narrowly as they say it; None where none of them says anything.

    Unknown bases agree with everything. Raises BaseMismatchError for two that differ, unless `allow_mismatch`: then the
    first one counts.

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
                f"one adapter is for {common.words} and another for {other.words}.",
                fix="Combine adapters of one base. --allow-base-mismatch adds what has the same names and shapes.",
            )
    return common


def _narrowed(a: BaseModel, b: BaseModel) -> BaseModel:
    """What both allow, with the fields that only one of them knows."""
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
