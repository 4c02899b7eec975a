"""Kernels that add a Kronecker sum to rows of a matrix without materializing it; the cheapest is chosen by size.

    Runs      outer values times runs of the inner factor: long runs, few terms (nearly every LoKr)
    Products  row blocks as one matrix product left·right each: a LoRA, or few columns in the inner factor
    Terms     all terms at once as one matrix product, whose blocks are permuted afterwards: many terms
    Spread    both factors spread over whole rows first: small inner factors

Each rounds every number once, except `Runs` and `Spread` with several terms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import inf
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from krona_hub.kron.hadamard import Hadamard
from krona_hub.kron.terms import Factor, LowRank
from krona_hub.merging.arithmetic.scratch import scratch
from krona_hub.merging.arithmetic.stored_layout import Sizes, StoredLayout

TILE = 1 << 18  # numbers processed at a time: few enough for the cache of a core, many enough to amortize Python calls
KEPT = 1 << 18  # numbers of a factor cached in the wide dtype; a larger factor is widened row by row


class Kernel(Protocol):
    """A prepared sum; it caches its last result, so each thread needs its own."""

    one_rounding: bool  # whether adding the sum rounds each number only once

    def add(self, tile: Tensor, p: range, q: range) -> None:
        """Add the consecutive rows p × q to tile (len(p)·len(q), columns)."""


class Rows:
    """Rows of a factor in the wide dtype: (terms, len(rows), columns), with axes of length 1 for broadcasting."""

    def __init__(self, factor: Factor, wide: torch.dtype, between: tuple[int, ...] = ()) -> None:
        self._wide, self._between, self._whole = wide, between, range(factor.shape[1])
        self._factor: Factor = factor
        if isinstance(factor, LowRank):
            self._factor = factor.map_sides(lambda up: up, lambda down: down.to(wide))
        self._kept = self._widened(self._whole) if factor.shape.numel() <= KEPT else None

    def __call__(self, rows: range) -> Tensor:
        if self._kept is None:
            return self._widened(rows)
        return self._kept if rows == self._whole else self._kept.narrow(1, rows.start, len(rows))

    def _widened(self, rows: range) -> Tensor:
        if isinstance(self._factor, LowRank):
            some = self._factor.map_sides(lambda up: up[:, rows.start : rows.stop].to(self._wide)).dense()
        else:
            some = self._factor[:, rows.start : rows.stop].to(self._wide)
        for axis in self._between:
            some = some.unsqueeze(axis)
        return some


class Last:
    """A function of a range that caches its last value, since neighboring tiles use the same."""

    def __init__(self, make: Callable[[range], Tensor]) -> None:
        self._make, self._key, self._value = make, range(0), torch.empty(0)

    def __call__(self, rows: range) -> Tensor:
        if rows != self._key:
            self._key, self._value = rows, self._make(rows)
        return self._value


class Runs:
    """T[p, q, r, s] += outer[p, r] · inner[q, s], term by term, along the last long axis."""

    def __init__(self, layout: StoredLayout, wide: torch.dtype) -> None:
        self._outer = Rows(layout.outer, wide, (2, 2) if layout.crossed else (2, 4))  # terms, p, q, r, s
        self._inner = Rows(layout.inner, wide, (3,) if layout.crossed else (2,))
        self._columns = layout.sizes[2:]
        self.one_rounding = layout.terms == 1

    def add(self, tile: Tensor, p: range, q: range) -> None:
        outer, inner = self._outer(p), self._inner(q)
        if self.one_rounding:
            tile.view(1, len(p), len(q), *self._columns).addcmul_(outer, inner)
            return
        view = tile.view(len(p), len(q), *self._columns)
        for a, b in zip(outer.unbind(), inner.unbind(), strict=True):
            view.addcmul_(a, b)


class Products:
    """A ⊗ (up·down) = (I ⊗ up)·(A ⊗ down): each block of rows gets up·right(p). Any B is B·I."""

    one_rounding = True

    def __init__(self, layout: StoredLayout, wide: torch.dtype) -> None:
        up, down = _as_product(layout.inner)
        self._left = Rows(up.transpose(0, 1).flatten(1)[None], wide)  # (1, Q, terms·rank)
        self._outer, self._down = Rows(layout.outer, wide), down.to(wide)
        self._pattern = "kps,kcr->pkcrs" if layout.crossed else "kpr,kcs->pkcrs"
        self._right = Last(self._rights)

    def _rights(self, p: range) -> Tensor:
        """(len(p), terms·rank, columns)"""
        spread = torch.einsum(self._pattern, self._outer(p), self._down)
        return spread.flatten(3).flatten(1, 2)

    def add(self, tile: Tensor, p: range, q: range) -> None:
        left, rights = self._left(q)[0], self._right(p)
        if len(p) == 1:
            tile.addmm_(left, rights[0])
            return
        for block, right in zip(tile.view(len(p), len(q), -1).unbind(), rights.unbind(), strict=True):
            block.addmm_(left, right)


def _as_product(factor: Factor) -> tuple[Tensor, Tensor]:
    """(terms, q, c) and (terms, c, columns)"""
    if isinstance(factor, LowRank):
        return factor.up, factor.down
    one = torch.eye(factor.shape[2])
    return factor, one.expand(len(factor), *one.shape)


class Terms:
    """All terms at once: (p·r, terms)·(terms, q·s), then permuted axes; crossed (q·r, terms)·(terms, p·s)."""

    one_rounding = True

    def __init__(self, layout: StoredLayout, wide: torch.dtype) -> None:
        self._outer, self._inner = Rows(layout.outer, wide), Rows(layout.inner, wide)
        self._columns, self._crossed = layout.sizes[2:], layout.crossed

    def add(self, tile: Tensor, p: range, q: range) -> None:
        outer, inner = self._outer(p).flatten(1), self._inner(q).flatten(1)
        (r, s), (m, n) = self._columns, (len(p), len(q))
        left, right = (inner, outer) if self._crossed else (outer, inner)
        if (m == 1) if self._crossed else (r == 1):  # the product is already in tile order
            tile.view(left.shape[1], right.shape[1]).addmm_(left.mT, right)
            return
        product = scratch("terms", tile.numel(), tile.dtype).view(left.shape[1], right.shape[1])
        torch.mm(left.mT, right, out=product)
        axes = (2, 0, 1, 3) if self._crossed else (0, 2, 1, 3)
        blocks = product.view(*((n, r, m, s) if self._crossed else (m, r, n, s))).permute(axes)
        tile.view(m, n, r, s).add_(blocks)


class Spread:
    """T[p, q, :] += x[p, :] · y[q, :], with x and y the rows of the factors spread over all columns."""

    def __init__(self, layout: StoredLayout, wide: torch.dtype) -> None:
        _, _, r, s = layout.sizes
        self._outer, self._inner = Rows(layout.outer, wide), Rows(layout.inner, wide)
        block, place = torch.arange(r * s) // s, torch.arange(r * s) % s
        self._x_columns, self._y_columns = (place, block) if layout.crossed else (block, place)
        self.one_rounding = layout.terms == 1

    def add(self, tile: Tensor, p: range, q: range) -> None:
        view = tile.view(len(p), len(q), -1)
        for outer, inner in zip(self._outer(p).unbind(), self._inner(q).unbind(), strict=True):
            x, y = _spread("x", outer, self._x_columns), _spread("y", inner, self._y_columns)
            view.addcmul_(x.unsqueeze(1), y)


def _spread(use: str, rows: Tensor, columns: Tensor) -> Tensor:
    out = scratch(use, len(rows) * len(columns), rows.dtype).view(len(rows), len(columns))
    return torch.index_select(rows, 1, columns, out=out)


# --- choosing --------------------------------------------------------------------------------------------------------

PER_NUMBER, PER_FLOP, PER_SPREAD, PER_RUN, PER_CALL = 0.12, 0.028, 0.4, 5.0, 5000.0  # ns on one core, measured


class Facts(NamedTuple):
    """Inputs of the cost model."""

    sizes: Sizes
    terms: int
    crossed: bool
    outer_depth: int | None  # multiplications per value; None: dense
    inner_depth: int | None
    tile_rows: int
    kept: int
    inner_is_hadamard: bool = False  # an elementwise product: its up and down are larger than its rows


def _runs_cost(f: Facts) -> float:
    run = f.sizes.s if f.sizes.s > 1 else f.sizes.r
    return f.terms * (PER_NUMBER + (PER_RUN / run if run < 16 else 0)) + _forming(f)


def _products_cost(f: Facts) -> float:
    _, q, r, s = f.sizes
    if f.inner_is_hadamard:
        return inf
    depth = f.terms * (f.inner_depth or (r if f.crossed else s))
    making = (2 * PER_NUMBER * depth if f.sizes.p > 1 else 0) + PER_CALL / (r * s)
    return PER_NUMBER / 2 + PER_FLOP * depth + making / min(q, f.tile_rows)


def _terms_cost(f: Facts) -> float:
    p, _, r, s = f.sizes
    in_order = (p == 1) if f.crossed else (r == 1)
    ordering = 0.0 if in_order else 2 * PER_NUMBER + (PER_RUN / s if s < 16 else 0)
    skinny = PER_RUN / s if s < 8 else 0
    return PER_NUMBER + PER_FLOP * f.terms + ordering + skinny + _forming(f)


def _spread_cost(f: Facts) -> float:
    spreading = PER_SPREAD * (1 / min(f.sizes.q, f.tile_rows) + 1 / _blocks(f))
    return f.terms * (PER_NUMBER + spreading) + _forming(f)


def _blocks(f: Facts) -> int:
    """Blocks of rows in a tile."""
    return max(1, min(f.sizes.p, f.tile_rows // f.sizes.q))


def _forming(f: Facts) -> float:
    """Return the cost of forming the rows of low-rank factors that are too large to cache, for each tile."""
    p, q, r, s = f.sizes
    outer, inner = (s, r) if f.crossed else (r, s)  # columns
    cost = 0.0
    if f.outer_depth and f.terms * p * outer > f.kept:
        cost += f.outer_depth * outer / min(q, f.tile_rows)
    if f.inner_depth and f.terms * q * inner > f.kept:
        cost += f.inner_depth * inner / _blocks(f)
    return PER_FLOP * f.terms * cost / (r * s)


class Maker(Protocol):
    """A kernel class."""

    def __call__(self, layout: StoredLayout, wide: torch.dtype, /) -> Kernel: ...


KERNELS: tuple[tuple[Maker, Callable[[Facts], float]], ...] = (
    (Runs, _runs_cost), (Products, _products_cost), (Terms, _terms_cost), (Spread, _spread_cost),
)  # fmt: skip


def cheapest_kernel(layout: StoredLayout, wide: torch.dtype) -> Kernel:
    """Return the cheapest kernel for a sum of these sizes."""
    tile_rows = max(1, TILE // (layout.sizes.r * layout.sizes.s))
    outer, inner = layout.outer, layout.inner
    depths = _depth(outer), _depth(inner)
    facts = Facts(
        layout.sizes, layout.terms, layout.crossed, *depths, tile_rows, KEPT, isinstance(inner, Hadamard)
    )  # fmt: skip
    return _cheapest(facts)(layout, wide)


def _depth(factor: Factor) -> int | None:
    return factor.depth if isinstance(factor, LowRank) else None


@lru_cache(maxsize=512)
def _cheapest(facts: Facts) -> Maker:
    """Choose a kernel; cached, since a model has hundreds of layers but few sizes."""
    return min(KERNELS, key=lambda kernel: kernel[1](facts))[0]
