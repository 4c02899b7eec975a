"""Split layers and their biases into the modules of a file that together store them, such as up_proj and gate_proj."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.adapters.delta_rows import delta_rows, equal_deltas
from krona_hub.bases.module_spec import Placement
from krona_hub.bases.name_table import NameTable
from krona_hub.errors import InexpressibleError
from krona_hub.formats.writing.module_names import Home

Homes = tuple[Home, ...]


def split_layer(delta: LayerDelta, homes: Homes) -> Iterator[tuple[Home, LayerDelta]]:
    """Yield the modules of a layer with their deltas; the inverse of `krona_hub.formats.reading.placed_layers.joined`.

    A module whose rows do not change is left out, unless no module changes. Raises UnsupportedError for a DoRA with a
    norm per input.
    """
    if homes[0].placement.part is None:
        yield homes[0], delta
        return
    parts = [(home, delta_rows(delta, [home.placement.part])) for home in homes if home.placement.part]
    changed = [(home, own) for home, own in parts if own.sums or own.magnitude is not None]
    yield from changed or parts


def split_vector(vector: Tensor, homes: Homes) -> Iterator[tuple[Home, Tensor]]:
    """Yield the modules of a layer with their parts of its bias, as `split_layer` does."""
    if homes[0].placement.part is None:
        yield homes[0], vector
        return
    parts = [(home, vector[slice(*home.placement.part)]) for home in homes if home.placement.part]
    changed = [(home, own) for home, own in parts if bool(own.any())]
    yield from changed or parts


def check_equal(module: str, parts: Sequence[tuple[Placement, LayerDelta]]) -> None:
    """Raise InexpressibleError unless all layers that share one stored weight are adapted, and alike."""
    first, delta = parts[0]
    adapted = {place.layer for place, _ in parts}
    missing = next((layer for layer in first.shared_with if layer not in adapted), None)
    if missing is not None:
        raise _shared(module, first.layer, missing, "only one of them is adapted")
    other = next((place for place, own in parts[1:] if not equal_deltas(delta, own)), None)
    if other is not None:
        raise _shared(module, first.layer, other.layer, "their deltas differ")


def check_equal_norms(name: str, norm: str, vectors: Mapping[str, Tensor], names: NameTable) -> None:
    """Raise InexpressibleError unless all norms that the file stores once, under this name, change alike."""
    places = names.vector_places(name, norm.partition(".")[0]) or ()
    for first, other in ((place.layer, other) for place in places[:1] for other in place.shared_with):
        for parameter in ("weight", "bias"):
            one, two = (vectors.get(f"{owner}.{parameter}") for owner in (first, other))
            if (one is None) != (two is None):
                raise _shared(name, first, other, "only one of them is adapted")
            if one is not None and two is not None and not torch.equal(one, two):
                raise _shared(name, first, other, "their deltas differ")


def _shared(module: str, one: str, other: str, why: str) -> InexpressibleError:
    return InexpressibleError(
        f"{module} is the weight of both {one} and {other}, and {why}.",
        fix="Write a format with diffusers names, such as --to krona or --to peft-lora.",
    )
