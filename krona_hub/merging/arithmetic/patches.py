"""Patches of a stored tensor: deltas of layers, their strengths, and the rows that they change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.bases.module_spec import Placement
from krona_hub.errors import BaseMismatchError, ConflictError
from krona_hub.kron.rows import take_rows
from krona_hub.merging.arithmetic.kernels import cheapest_kernel
from krona_hub.merging.arithmetic.stored_layout import StoredLayout, lay_out


@dataclass(frozen=True, eq=False)
class Patch:
    """One layer of an adapter on a stored tensor: adds weight · ΔW to the stored rows `placement.rows`."""

    delta: LayerDelta
    weight: float  # strength, any sign; 0 leaves the rows unchanged
    placement: Placement


class Addition:
    """A prepared patch, to be added to any of its rows. It caches its last result, so each thread needs its own."""

    def __init__(self, patch: Patch, layouts: Sequence[StoredLayout], wide: torch.dtype) -> None:
        self.patch, self._layouts = patch, layouts
        self._kernels = [(cheapest_kernel(layout, wide), layout.sizes.q) for layout in layouts]

    @property
    def block(self) -> int:
        """Rows per block; tiles of whole blocks are the fastest."""
        return self._kernels[0][1] if self._kernels else 1

    @property
    def one_rounding(self) -> bool:
        """Whether it can be added directly to the base with each number rounded only once."""
        return len(self._kernels) == 1 and self._kernels[0][0].one_rounding and self.patch.delta.magnitude is None

    def squared_norm(self) -> float:
        """Return ‖w·ΔW‖² of a patch of one sum, from its factors."""
        return sum(layout.squared_norm() for layout in self._layouts)

    def add_to(self, tile: Tensor, first: int) -> None:
        """Add rows first, first + 1, … of w·ΔW to tile (rows, columns); for DoRA those of ΔW, without w."""
        for kernel, block in self._kernels:
            for start, p, q in _pieces(first, first + tile.shape[0], block):
                rows = len(p) * len(q)
                kernel.add(tile if rows == tile.shape[0] else tile.narrow(0, start, rows), p, q)


def _pieces(first: int, last: int, block: int) -> Iterator[tuple[int, range, range]]:
    """Split rows first … last - 1 into products of block numbers and rows inside a block, each with its offset.

    >>> [(start, list(p), list(q)) for start, p, q in _pieces(1, 5, 2)]
    [(0, [0], [1]), (1, [1], [0, 1]), (3, [2], [0])]
    """
    row = first
    while row < last:
        p, q = divmod(row, block)
        whole = (last - row) // block if q == 0 else 0
        rows = range(block) if whole else range(q, min(block, q + last - row))
        blocks = range(p, p + max(1, whole))
        yield row - first, blocks, rows
        row += len(blocks) * len(rows)


class PatchRows(NamedTuple):
    """Stored rows that are consecutive in a layer too."""

    rows: range  # of the stored tensor
    first: int  # their first row in the layer (as stored)
    addition: Addition

    def row(self, stored: int) -> int:
        """Return the row of the layer for a stored row."""
        return self.first + stored - self.rows.start

    def add_to(self, tile: Tensor, start: int) -> None:
        """Add to a tile (rows, columns) that begins at the stored row `start`."""
        self.addition.add_to(tile, self.row(start))


class Segment(NamedTuple):
    """Stored rows that the same parts change."""

    rows: range
    parts: tuple[PatchRows, ...]


def additions(patches: Sequence[Patch], size: tuple[int, int], wide: torch.dtype, name: str) -> list[Addition]:
    """Prepare the patches that change a stored tensor of (rows, columns).

    Raises BaseMismatchError, naming the tensor, if the size of a delta differs from its rows.
    """
    ready = []
    for patch in patches:
        _check_size(patch, size, name)
        layouts = _layouts(patch) if patch.weight else []
        if layouts or (patch.weight and patch.delta.magnitude is not None):
            ready.append(Addition(patch, layouts, wide))
    return ready


def _layouts(patch: Patch) -> list[StoredLayout]:
    """Return the sums in the layout of the file, scaled by the strength; DoRA is scaled later."""
    place, sums = patch.placement, patch.delta.sums
    if place.swap_halves and place.transpose:  # the halves are stored as columns
        half = patch.delta.matrix_shape[0] // 2
        sums = tuple(take_rows(s, [(half, 2 * half), (0, half)]) for s in sums)
    layouts = [lay_out(s, transposed=place.transpose) for s in sums if s.terms]
    strength = patch.weight if patch.delta.magnitude is None else 1.0
    return [layout.scaled(strength) for layout in layouts if not layout.is_zero]


def _check_size(patch: Patch, size: tuple[int, int], name: str) -> None:
    start, stop = patch.placement.rows or (0, size[0])
    wanted = patch.delta.matrix_shape[::-1] if patch.placement.transpose else patch.delta.matrix_shape
    if not 0 <= start <= stop <= size[0] or wanted != (stop - start, size[1]):
        raise BaseMismatchError(
            f"{name or 'The tensor'} is {stop - start}x{size[1]} for {patch.placement.layer}, "
            f"but its delta is {wanted[0]}x{wanted[1]}.",
            fix="Merge into the base model that the adapter was trained on.",
        )


def parts_of(addition: Addition, height: int) -> tuple[PatchRows, ...]:
    """Locate an addition in a stored tensor of `height` rows: one range, or two swapped halves."""
    place = addition.patch.placement
    start, stop = place.rows or (0, height)
    if not place.swap_halves or place.transpose:
        return (PatchRows(range(start, stop), 0, addition),)
    half = (stop - start) // 2
    return PatchRows(range(start, start + half), half, addition), PatchRows(range(start + half, stop), 0, addition)


def segments(ready: Sequence[Addition], height: int, name: str) -> list[Segment]:
    """Split the rows of the tensor, in order, by the set of parts that change them.

    Raises ConflictError if two DoRA layers change the same rows.
    """
    parts = [part for addition in ready for part in parts_of(addition, height)]
    edges = sorted({0, height, *(edge for part in parts for edge in (part.rows.start, part.rows.stop))})
    cut = []
    for start, stop in pairwise(edges):
        here = tuple(part for part in parts if start in part.rows)
        _check_dora(here, name)
        cut.append(Segment(range(start, stop), here))
    return cut


def _check_dora(parts: Sequence[PatchRows], name: str) -> None:
    layers = [p.addition.patch.placement.layer for p in parts if p.addition.patch.delta.magnitude is not None]
    if len(layers) > 1:
        raise ConflictError(
            f"{name or layers[0]} has two DoRA layers; each sets the norm of its rows.",
            fix="Merge one of the adapters first, then the other into the result.",
        )
