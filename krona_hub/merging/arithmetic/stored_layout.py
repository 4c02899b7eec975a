"""Layout of a Kronecker sum in a stored matrix, possibly transposed, with or without interleaved rows.

Row p·Q + q and column r·S + s of the stored matrix get, summed over the terms,

    outer[p, r] · inner[q, s]          or, if crossed,                   outer[p, s] · inner[q, r]

A ⊗ B and its transpose are plain, DiffuseKronA's interleaved rows (FORMATS.md §8) and their transpose are crossed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.kron.hadamard import Hadamard
from krona_hub.kron.terms import Factor, KronTerms, LowRank, factor_tensors, transpose_factor

BLOCK = 1 << 17  # numbers of a large factor that are widened at a time


class Sizes(NamedTuple):
    """The stored matrix is (p·q, r·s)."""

    p: int
    q: int
    r: int
    s: int


@dataclass(frozen=True, eq=False)
class StoredLayout:
    """One Kronecker sum in the order of the stored matrix."""

    outer: Factor  # (terms, P, R), crossed: (terms, P, S)
    inner: Factor  # (terms, Q, S), crossed: (terms, Q, R)
    crossed: bool = False

    @property
    def terms(self) -> int:
        return self.outer.shape[0]

    @cached_property
    def sizes(self) -> Sizes:
        (_, p, first), (_, q, second) = self.outer.shape, self.inner.shape
        return Sizes(p, q, second, first) if self.crossed else Sizes(p, q, first, second)

    @property
    def is_zero(self) -> bool:
        """Whether a factor is entirely zero: then nothing is added, and the base keeps its bits."""
        return not all(_holds_any(t) for t in (*factor_tensors(self.outer), *factor_tensors(self.inner)))

    def scaled(self, weight: float) -> StoredLayout:
        """Return weight · ΔW. The weight is folded into the smallest tensor, which becomes float64."""
        if weight == 1:
            return self
        smallest = min((*factor_tensors(self.outer), *factor_tensors(self.inner)), key=Tensor.numel)
        return StoredLayout(_scaled(self.outer, smallest, weight), _scaled(self.inner, smallest, weight), self.crossed)

    def squared_norm(self) -> float:
        """Return ‖ΔW‖² = Σₖₗ ⟨outerₖ, outerₗ⟩·⟨innerₖ, innerₗ⟩, in float64, from the factors."""
        return max(0.0, float((_gram(self.outer) * _gram(self.inner)).sum()))


def lay_out(s: KronTerms, *, transposed: bool = False) -> StoredLayout:
    """Return the layout of a sum in W, or in Wᵀ, with the longest runs.

    >>> lay_out(KronTerms(torch.ones(1, 6, 2), torch.ones(1, 4, 5))).sizes
    Sizes(p=6, q=4, r=2, s=5)
    >>> lay_out(KronTerms(torch.ones(1, 6, 2), torch.ones(1, 4, 5), "shuffled"), transposed=True).sizes
    Sizes(p=2, q=5, r=4, s=6)
    """
    left, right = (transpose_factor(s.left), transpose_factor(s.right)) if transposed else (s.left, s.right)
    if s.rows == "shuffled" and not transposed:
        return _simplest(StoredLayout(right, left, crossed=True))
    return _simplest(StoredLayout(left, right, crossed=s.rows == "shuffled"))


def _simplest(layout: StoredLayout) -> StoredLayout:
    """Return an equal layout, with one block of rows if possible, and not crossed if both layouts are equal."""
    outer, inner, crossed = layout.outer, layout.inner, layout.crossed
    if layout.sizes.q == 1:
        outer, inner, crossed = inner, outer, not crossed
    return StoredLayout(outer, inner, crossed and 1 not in layout.sizes[2:])


def _holds_any(stack: Tensor) -> bool:
    """Return whether any number is nonzero, checking a first row early."""
    return bool(stack[:1, :1].any()) or bool(stack.any())


def _scaled(factor: Factor, chosen: Tensor, weight: float) -> Factor:
    """Multiply one tensor of the factor by `weight`, if `chosen` is one of them."""
    if isinstance(factor, Hadamard):  # one of its tensors, however often it occurs in the product
        here = any(t is chosen for t in factor.tensors)
        return factor.map_up(lambda up: up.double() * weight) if here else factor
    if isinstance(factor, LowRank):
        up, down = (t.double() * weight if t is chosen else t for t in (factor.up, factor.down))
        return LowRank(up, down)
    return factor.double() * weight if factor is chosen else factor


def _gram(factor: Factor) -> Tensor:
    """Return ⟨factorₖ, factorₗ⟩ of all pairs of terms: (terms, terms), float64."""
    if isinstance(factor, Hadamard):  # r₁²·r₂² products of columns would cost more than the matrix
        step = max(1, BLOCK // (factor.shape[0] * factor.shape[2]))
        blocks = (_rows(factor, i, i + step).dense() for i in range(0, factor.shape[1], step))
        return sum((_gram(block) for block in blocks), torch.zeros((), dtype=torch.float64))
    if not isinstance(factor, LowRank):
        return _summed(factor, lambda rows: rows.flatten(1))
    terms, rank = len(factor.up), factor.rank
    ups, downs = (_summed(t, _columns) for t in (factor.up, factor.down.mT))  # (terms·rank, terms·rank)
    return (ups * downs).reshape(terms, rank, terms, rank).sum((1, 3))


def _rows(factor: LowRank, start: int, stop: int) -> LowRank:
    return factor.map_sides(lambda up: up[:, start:stop])


def _columns(stack: Tensor) -> Tensor:
    """(terms, p, r) -> (terms·r, p)"""
    return stack.transpose(1, 2).flatten(0, 1)


def _summed(stack: Tensor, vectors: Callable[[Tensor], Tensor]) -> Tensor:
    """Return V·Vᵀ with V = vectors(stack), in float64, or for a large stack a few rows at a time in float32."""
    if stack.numel() <= BLOCK:
        v = vectors(stack.to(torch.promote_types(stack.dtype, torch.float32)).double())  # half to double is slow
        return v @ v.mT
    step = max(1, BLOCK // (stack.shape[0] * stack.shape[2]))
    parts = (vectors(stack[:, i : i + step].float()) for i in range(0, stack.shape[1], step))
    return sum(((v @ v.mT).double() for v in parts), torch.zeros((), dtype=torch.float64))
