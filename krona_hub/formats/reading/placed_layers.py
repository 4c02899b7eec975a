"""The layer that a module of a file adapts: the whole module, some of its rows, its transpose, or rows of the layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.adapters.delta_rows import stacked_deltas
from krona_hub.bases.module_spec import Placement
from krona_hub.errors import UnsupportedError
from krona_hub.kron.rows import Range, take_rows, transposed


def layer_of(module: LayerDelta, place: Placement, weight_shape: tuple[int, ...] | None) -> LayerDelta:
    """Return the part of a module's delta that belongs to one layer; `weight_shape` is that of the base, if known.

    If the module fills only some rows of the layer, the result is the delta of these rows: see `joined`.
    The inverse of `krona_hub.formats.writing.fuse_modules.fused`. Raises UnsupportedError for a DoRA that cannot be
    split.

    >>> import torch
    >>> from krona_hub.kron.terms import as_lora
    >>> qkv = LayerDelta((as_lora(torch.ones(12, 2), torch.ones(2, 5)),), (12, 5))
    >>> layer_of(qkv, Placement("unet.x.to_k", rows=(4, 8)), None).weight_shape
    (4, 5)
    """
    if place.part and weight_shape:
        weight_shape = (place.part[1] - place.part[0], *weight_shape[1:])
    if place.rows is None and not place.swap_halves and not place.transpose:
        if weight_shape in (None, module.weight_shape):
            return module
        return replace(module, weight_shape=weight_shape)
    if module.magnitude is not None and (place.transpose or (module.magnitude_axis == "in" and place.rows)):
        raise UnsupportedError(
            "A DoRA with norms over several fused layers cannot be split.", fix="Merge it into its base model."
        )
    sums = tuple(map(transposed, module.sums)) if place.transpose else module.sums
    height = module.matrix_shape[place.transpose]
    ranges, magnitude = _ranges(place, height), module.magnitude
    if magnitude is not None and module.magnitude_axis == "out":
        magnitude = magnitude[[row for start, stop in ranges for row in range(start, stop)]]
    taken = tuple(take_rows(s, ranges) for s in sums)
    size = (sum(stop - start for start, stop in ranges), module.matrix_shape[not place.transpose])
    return LayerDelta(taken, weight_shape or size, magnitude, module.magnitude_axis)


def joined(parts: Sequence[tuple[Placement, LayerDelta]], weight_shape: tuple[int, ...] | None) -> LayerDelta:
    """Return the delta of a layer from those of its rows, as `layer_of` returns them; rows without one do not change.

    Raises UnsupportedError for a DoRA of only some rows.
    """
    by_rows = [(place.part, delta) for place, delta in parts if place.part]
    if not by_rows or weight_shape is None:
        return parts[-1][1]
    return stacked_deltas(by_rows, weight_shape)


def _ranges(place: Placement, height: int) -> list[Range]:
    """Return the row ranges of the stored module that form the layer, in the order of the layer."""
    start, stop = place.rows or (0, height)
    if not place.swap_halves:
        return [(start, stop)]
    middle = (start + stop) // 2
    return [(middle, stop), (start, middle)]
