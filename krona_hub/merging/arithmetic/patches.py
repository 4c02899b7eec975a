"""What is added to a stored tensor: layers' deltas, their strengths, and the rows of the tensor where they lie."""

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
    """One adapter's layer on a stored tensor: stored rows `placement.rows` get weight · ΔW."""

    delta: LayerDelta
    weight: float  # strength, any sign; 0 leaves the rows as they are
    placement: Placement


class Addition:
    """A patch ready to be added to any of its rows. Belongs to one thread: it keeps what it made last."""

    def __init__(self, patch: Patch, layouts: Sequence[StoredLayout], wide: torch.dtype) -> None:
        self.patch, self._layouts = patch, layouts
        self._ways = [(cheapest_kernel(layout, wide), layout.sizes.q) for layout in layouts]

    @property
    def block(self) -> int:
        """Rows that belong together: tiles of whole blocks are the fastest."""
        return self._ways[0][1] if self._ways else 1

    @property
    def one_rounding(self) -> bool:
        """Whether it may be added to the base itself: each number is then rounded just once."""
        return len(self._ways) == 1 and self._ways[0][0].one_rounding and self.patch.delta.magnitude is None

    def squared_norm(self) -> float:
        """‖w·ΔW‖² of a patch of one sum, from its factors."""
        return sum(layout.squared_norm() for layout in self._layouts)

    def add_to(self, tile: Tensor, first: int) -> None:
        """tile (rows, columns) += rows first, first + 1, … of w·ΔW; of ΔW, without w, where it is DoRA."""
        for way, block in self._ways:
            for start, p, q in _pieces(first, first + tile.shape[0], block):
                rows = len(p) * len(q)
                way.add(tile if rows == tile.shape[0] else tile.narrow(0, start, rows), p, q)


def _pieces(first: int, last: int, block: int) -> Iterator[tuple[int, range, range]]:
    """Rows first … last - 1 as products of block numbers and rows inside a block, each with its offset.

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
    """Stored rows that lie together in a layer too."""

    rows: range  # of the stored tensor
    first: int  # row of the layer (as it is stored) that the first of them is
    addition: Addition

    def row(self, stored: int) -> int:
        """The row of the layer that a stored row is."""
        return self.first + stored - self.rows.start

    def add_to(self, tile: Tensor, start: int) -> None:
        """Add to a tile (rows, columns), whose first is the stored row `start`."""
        self.addition.add_to(tile, self.row(start))


class Segment(NamedTuple):
    """Stored rows that the same parts touch."""

    rows: range
    parts: tuple[PatchRows, ...]


def additions(patches: Sequence[Patch], size: tuple[int, int], wide: torch.dtype, name: str) -> list[Addition]:
    """The patches that change anything in a stored tensor of (rows, columns), ready to be added.

    Raises BaseMismatchError, naming the tensor, where a delta has another size than its rows.
    """
    ready = []
    for patch in patches:
        _check_size(patch, size, name)
        layouts = _layouts(patch) if patch.weight else []
        if layouts or (patch.weight and patch.delta.magnitude is not None):
            ready.append(Addition(patch, layouts, wide))
    return ready


def _layouts(patch: Patch) -> list[StoredLayout]:
    """The sums as the file lays them out, the strength inside; DoRA comes to its strength later."""
    place, sums = patch.placement, patch.delta.sums
    if place.swap_halves and place.transpose:  # the halves are columns of what is stored
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
            f"{name or 'the tensor'} has {stop - start}x{size[1]} numbers for {patch.placement.layer}, "
            f"whose delta is {wanted[0]}x{wanted[1]}.",
            fix="Merge into the base model that the adapter was trained on.",
        )


def parts_of(addition: Addition, height: int) -> tuple[PatchRows, ...]:
    """Where an addition lies in a stored tensor of `height` rows: in one piece, or in two swapped halves."""
    place = addition.patch.placement
    start, stop = place.rows or (0, height)
    if not place.swap_halves or place.transpose:
        return (PatchRows(range(start, stop), 0, addition),)
    half = (stop - start) // 2
    return PatchRows(range(start, start + half), half, addition), PatchRows(range(start + half, stop), 0, addition)


def segments(ready: Sequence[Addition], height: int, name: str) -> list[Segment]:
    """All rows of the tensor, in order, cut where another set of parts begins.

    Raises ConflictError where two DoRA layers lie on the same rows.
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
            f"{name or layers[0]} gets two DoRA layers, and each wants to set the norm of its rows.",
            fix="Merge one of the adapters first, and the other into the result.",
        )
