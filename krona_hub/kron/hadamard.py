"""The elementwise product of two low-rank matrices, W = W₁ ∘ W₂, which LoHa stores (Hyeon-Woo et al., 2022, FedPara).

    W₁ = up₁·down₁, of rank r₁     W₂ = up₂·down₂, of rank r₂     W = up·down, of rank r₁·r₂

Each column of `up` is the elementwise product of a column of up₁ and one of up₂, and each row of `down` that of a row
of down₁ and one of down₂ (the Khatri-Rao products): the elementwise product is a low-rank product of rank r₁·r₂.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from krona_hub.errors import ShapeError
from krona_hub.kron.terms import Factor, KronTerms, LowRank


class Hadamard(LowRank):
    """A stack of matrices stored as elementwise products: matrix k is first[k] ∘ second[k].

    It stores the tensors of `first` and `second` only; `up` and `down`, which can be larger than the matrix, are
    computed on each access. Raises ShapeError if the two stacks differ in shape.

    >>> rand = torch.Generator().manual_seed(0)
    >>> one, two = (LowRank(*(torch.rand(1, *s, generator=rand) for s in ((4, r), (r, 6)))) for r in (2, 3))
    >>> both = Hadamard(one, two)
    >>> tuple(both.shape), both.rank, torch.allclose(both.up @ both.down, both.dense())
    ((1, 4, 6), 6, True)
    """

    first: LowRank
    second: LowRank

    def __init__(self, first: LowRank, second: LowRank) -> None:
        if first.shape != second.shape:
            raise ShapeError(
                f"the two products are {tuple(first.shape)} and {tuple(second.shape)}, but must have one shape.",
                fix="Pass the two products of one layer.",
            )
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "second", second)

    @property
    def up(self) -> Tensor:
        """(terms, p, r₁·r₂), at least float32."""
        one, two = _alike(self.first.up, self.second.up)
        return (one[..., :, None] * two[..., None, :]).flatten(2)

    @property
    def down(self) -> Tensor:
        """(terms, r₁·r₂, q), at least float32."""
        one, two = _alike(self.first.down, self.second.down)
        return (one[:, :, None] * two[:, None]).flatten(1, 2)

    @property
    def shape(self) -> torch.Size:
        """(terms, p, q), the shape of the products."""
        return self.first.shape

    @property
    def rank(self) -> int:
        """The product r₁·r₂ of the two ranks."""
        return self.first.rank * self.second.rank

    @property
    def depth(self) -> int:
        """Multiplications per value of the matrices."""
        return self.first.depth + self.second.depth + 1

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The stored tensors: those of the first product, then those of the second."""
        return self.first.tensors + self.second.tensors

    def dense(self) -> Tensor:
        """Return the products, (terms, p, q), in the widest of the dtypes, at least float32."""
        return self.first.dense() * self.second.dense()

    def map_sides(self, up: Callable[[Tensor], Tensor], down: Callable[[Tensor], Tensor] = lambda t: t) -> Hadamard:
        """Apply functions to both up and to both down: they may select, repeat or order rows, or set them to zero."""
        return Hadamard(self.first.map_sides(up, down), self.second.map_sides(up, down))

    def map_up(self, change: Callable[[Tensor], Tensor]) -> Hadamard:
        """Apply a linear `change` of values, such as a multiplication: it acts on one tensor, hence on the product."""
        return Hadamard(self.first.map_up(change), self.second)

    def transposed(self) -> Hadamard:
        """Return the stack of transposed matrices."""
        return Hadamard(self.first.transposed(), self.second.transposed())


def as_low_rank(factor: LowRank) -> LowRank:
    """Return an elementwise product as up·down of the lowest rank that its sizes imply, min(r₁·r₂, p, q).

    Beyond min(p, q), one side is an identity. Other products are returned as they are.
    """
    if not isinstance(factor, Hadamard):
        return factor
    terms, p, q = factor.shape
    if factor.rank <= min(p, q):
        return LowRank(factor.up, factor.down)
    matrix = factor.dense()
    one = torch.eye(min(p, q), dtype=matrix.dtype, device=matrix.device).expand(terms, -1, -1)
    return LowRank(one, matrix) if p <= q else LowRank(matrix, one)


def is_hadamard(terms: KronTerms) -> bool:
    """Whether a factor of the sum is an elementwise product."""
    return isinstance(terms.left, Hadamard) or isinstance(terms.right, Hadamard)


def expanded(terms: KronTerms, *, always_low_rank: bool = False) -> KronTerms:
    """Replace elementwise products by up·down or by the dense matrix, whichever is smaller; others stay unchanged.

    With `always_low_rank`, they become up·down in any case.

    >>> thin, thick = (LowRank(torch.ones(1, 9, r), torch.ones(1, r, 8)) for r in (1, 4))
    >>> [type(expanded(KronTerms(torch.ones(1, 1, 1), Hadamard(x, x))).right).__name__ for x in (thin, thick)]
    ['LowRank', 'Tensor']
    """
    if not is_hadamard(terms):
        return terms
    left, right = (_expanded(factor, always_low_rank) for factor in (terms.left, terms.right))
    return replace(terms, left=left, right=right)


def _expanded(factor: Factor, always_low_rank: bool) -> Factor:
    if not isinstance(factor, Hadamard):
        return factor
    _, p, q = factor.shape
    return as_low_rank(factor) if always_low_rank or factor.rank * (p + q) < p * q else factor.dense()


def _alike(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Convert both to the wider of their dtypes, at least float32: the products of half precision need more bits."""
    dtype = torch.promote_types(torch.promote_types(one.dtype, two.dtype), torch.float32)
    return one.to(dtype), two.to(dtype)
