"""Match the deltas of an adapter to the modules of a model, with a cause for every delta that does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.errors import BaseMismatchError, KronaError, ShapeError, UnsupportedError
from krona_hub.kron.rows import among_rows
from krona_hub.layers.adapter_branch import RowShare
from krona_hub.layers.module_tree import Slot, slots_of, weight_shape_of

Deltas = Mapping[str, LayerDelta]  # by canonical layer
Parts = Mapping[str, nn.Module]  # component -> model
Problems = dict[str, KronaError]  # by canonical layer or parameter
MODEL = "Use the model that the adapter was made for."  # the way out of most of them
NO_LAYER = "The model has no such layer."


class Placing(NamedTuple):
    """What one module gets: the delta of its layer, or of the several layers that diffusers fused into it."""

    slot: Slot
    layer: str  # canonical name, or the first of several
    delta: LayerDelta
    parts: tuple[RowShare, ...] = ()


class Share(NamedTuple):
    """The part of a module that one layer gets."""

    slot: Slot
    layer: str
    delta: LayerDelta


def placings(deltas: Deltas, parts: Parts) -> tuple[list[Placing], Problems]:
    """Return the module for each delta, in order, and the layers that do not fit."""
    slots = slots_of(parts)
    shares: dict[tuple[int, str], list[Share]] = {}
    problems: Problems = {}
    for layer, delta in deltas.items():
        try:
            share = _share(layer, delta, slots, parts)
            shares.setdefault(share.slot.position, []).append(share)
        except KronaError as error:
            problems[layer] = error
    return [_joined(each) for each in shares.values()], problems


def _share(layer: str, delta: LayerDelta, slots: Mapping[str, Slot], parts: Parts) -> Share:
    check_component(layer, parts)
    slot = slots.get(layer)
    if slot is None:
        raise BaseMismatchError(NO_LAYER, fix=MODEL)
    shape = slot.weight_shape
    if shape is None or not _same_matrix(delta.weight_shape, shape):
        raise ShapeError(
            f"The adapter changes a weight of shape {delta.weight_shape}, but the layer has {shape}.", fix=MODEL
        )
    return Share(slot, layer, _in_rows(delta, slot))


def check_component(name: str, parts: Parts) -> None:
    """Raise BaseMismatchError if the component of a layer or parameter is missing."""
    component = name.partition(".")[0]
    if component not in parts:
        raise BaseMismatchError(f"The pipeline has no {component}.", fix="Load the pipeline with it.")


def _same_matrix(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether shapes are equal up to 1×1 kernels: a 1×1 convolution and a linear layer have the same matrix."""
    return a == b or (a[:2] == b[:2] and set(a[2:] + b[2:]) <= {1})


def _in_rows(delta: LayerDelta, slot: Slot) -> LayerDelta:
    """Return the delta for the whole module if the layer is only some of its rows."""
    whole = weight_shape_of(slot.module)
    if slot.rows is None or whole is None:
        return delta
    if delta.magnitude is not None:
        raise UnsupportedError("A fused projection does not support DoRA.", fix="Call unfuse_qkv_projections() first.")
    return LayerDelta(tuple(among_rows(s, slot.rows[0], whole[0]) for s in delta.sums), whole)


def _joined(shares: Sequence[Share]) -> Placing:
    """Concatenate the sums of q, k and v of a fused projection; usually, a module has a single share."""
    slot, layer, delta = shares[0]
    if slot.rows is None:
        return Placing(slot, layer, delta)
    sums = tuple(s for share in shares for s in share.delta.sums)
    parts = tuple(RowShare(s.layer, s.slot.rows, len(s.delta.sums)) for s in shares if s.slot.rows)
    return Placing(slot, layer, replace(delta, sums=sums), parts)
