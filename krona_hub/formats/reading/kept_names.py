"""Names of a native file whose base model was unknown when it was written, in a base model that is now known."""

from __future__ import annotations

from dataclasses import replace

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.adapters.unknown_base import UNKNOWN
from krona_hub.bases.base import Base
from krona_hub.formats.parsing.base_match import places_of_kept
from krona_hub.formats.parsing.vector_match import kept_parameter
from krona_hub.formats.reading.placed_layers import layer_of


def resolved(adapter: Adapter, base: Base) -> Adapter:
    """Return the adapter with the names of `base`; what the base has no module for keeps its name."""
    if UNKNOWN not in adapter.components or UNKNOWN in base.components:
        return adapter
    places = places_of_kept({name: delta.weight_shape for name, delta in adapter.layers.items()}, base)
    layers: dict[str, LayerDelta] = {}
    for name, delta in adapter.layers.items():
        for place in places.get(name, ()):
            module = base.module(place.layer)
            layers[place.layer] = layer_of(delta, place, module.shape if module else None)
        if name not in places:
            layers[name] = delta
    vectors = {kept_parameter(name, tuple(v.shape), base): v for name, v in adapter.vectors.items()}
    return replace(adapter, layers=layers, vectors=vectors)
