"""Names of a native file whose base model was unknown when it was written, in a base model that is now known."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.adapters.unknown_base import UNKNOWN
from krona_hub.bases.base import Base
from krona_hub.errors import ConflictError
from krona_hub.formats.parsing.base_match import places_of_kept
from krona_hub.formats.parsing.vector_match import kept_parameter
from krona_hub.formats.reading.placed_layers import layer_of

T = TypeVar("T")


def resolved(adapter: Adapter, base: Base) -> Adapter:
    """Return the adapter with the names of `base`; what the base has no module for keeps its name.

    Raises ConflictError if two of its names mean the same layer or parameter of the base.
    """
    if UNKNOWN not in adapter.components or UNKNOWN in base.components:
        return adapter
    places = places_of_kept({name: delta.weight_shape for name, delta in adapter.layers.items()}, base)
    layers: dict[str, LayerDelta] = {}
    vectors: dict[str, Tensor] = {}
    for name, delta in adapter.layers.items():
        for place in places.get(name, ()):
            module = base.module(place.layer)
            _add(layers, place.layer, layer_of(delta, place, module.shape if module else None), name)
        if name not in places:
            _add(layers, name, delta, name)
    for name, vector in adapter.vectors.items():
        _add(vectors, kept_parameter(name, tuple(vector.shape), base), vector, name)
    return replace(adapter, layers=layers, vectors=vectors)


def _add(found: dict[str, T], name: str, value: T, own: str) -> None:
    if name in found:
        raise ConflictError(
            f"{own} and another name of the file both mean {name}.",
            fix="Keep one of them, or combine the adapters again with --base.",
        )
    found[name] = value
