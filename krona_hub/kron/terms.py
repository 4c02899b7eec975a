"""Sums of Kronecker products, and the one nearest to a given matrix.

    ΔW = Σₖ Aₖ ⊗ Bₖ     ΔW: (out, in)   Aₖ: (a1, a2)   Bₖ: (b1, b2)   out = a1·b1   in = a2·b2

The letters are those of DiffuseKronA and mean the same in every file of krona_hub; the nearest
sum is that of Van Loan & Pitsianis, "Approximation with Kronecker Products" (1993). Either factor may
itself be low-rank, A = up·down: a LoRA is [[1]] ⊗ (up·down). This module knows tensors only: no files,
no layer names, and no alpha or rank. Whatever scale a file carried is already in the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from krona_hub.errors import ShapeError
from krona_hub.kron.shapes import KronShape, split

Rows = Literal["kron", "shuffled"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """A stack of matrices kept as products: matrix k is up[k] @ down[k]."""

    up: Tensor  # (terms, p, r)
    down: Tensor  # (terms, r, q)

    def __post_init__(self) -> None:
        fits = self.up.ndim == self.down.ndim == 3 and len(self.up) == len(self.down)
        if not fits or self.up.shape[2] != self.down.shape[1]:
            raise ShapeError(
                f"up {tuple(self.up.shape)} and down {tuple(self.down.shape)} must be (terms, p, r) and "
                "(terms, r, q) with equal terms and equal r.",
                fix="For a single pair pass up[None], down[None].",
            )

    @property
    def shape(self) -> torch.Size:
        """(terms, p, q), as if the products were formed."""
        return torch.Size((len(self.up), self.up.shape[1], self.down.shape[2]))

    @property
    def rank(self) -> int:
        return self.up.shape[2]

    def dense(self) -> Tensor:
        """The products, (terms, p, q), in the wider dtype of the two and in float32 at least."""
        up, down = _wide_alike(self.up, self.down)
        return up @ down


Factor = Tensor | LowRank  # (terms, p, q), stored or as a product


def dense_factor(factor: Factor) -> Tensor:
    """The (terms, p, q) numbers of a factor; float32 at least where it is a product."""
    return factor.dense() if isinstance(factor, LowRank) else factor


def map_factor(change: Callable[[Tensor], Tensor], factor: Factor) -> Factor:
    """The factor with every tensor that it is stored as changed: itself, or its up and its down.

    >>> map_factor(Tensor.double, LowRank(torch.ones(1, 4, 2), torch.ones(1, 2, 6))).up.dtype
    torch.float64
    """
    if isinstance(factor, LowRank):
        return LowRank(change(factor.up), change(factor.down))
    return change(factor)


def transpose_factor(factor: Factor) -> Factor:
    """Every matrix of the stack transposed: (terms, p, q) -> (terms, q, p)."""
    return LowRank(factor.down.mT, factor.up.mT) if isinstance(factor, LowRank) else factor.mT


def stored_rank(factor: Factor) -> int | None:
    """The r of a factor that is kept as up·down; None for a dense one."""
    return factor.rank if isinstance(factor, LowRank) else None


def rank_bound(factor: Factor) -> int:
    """The rank that each matrix of the stack has at most."""
    small = min(factor.shape[1:])
    return min(small, factor.rank) if isinstance(factor, LowRank) else small


def factor_tensors(factor: Factor) -> tuple[Tensor, ...]:
    """The tensors that a factor is stored as: itself, or (up, down)."""
    return (factor.up, factor.down) if isinstance(factor, LowRank) else (factor,)


@dataclass(frozen=True, eq=False)
class KronTerms:
    """Σₖ Aₖ ⊗ Bₖ, kept as its factors: left[k] is Aₖ and right[k] is Bₖ.

    `rows` says how the rows of the sum are laid out. In the order of DiffuseKronA, "shuffled", row
    i1·a1 + j1 of W is row j1·b1 + i1 of A ⊗ B (FORMATS.md §8): the blocks are interleaved.
    """

    left: Factor  # (terms, a1, a2)
    right: Factor  # (terms, b1, b2)
    rows: Rows = "kron"

    def __post_init__(self) -> None:
        left, right = tuple(self.left.shape), tuple(self.right.shape)
        if len(left) != 3 or len(right) != 3 or left[0] != right[0]:
            raise ShapeError(
                f"left {left} and right {right} must be (terms, a1, a2) and (terms, b1, b2) with equal terms.",
                fix="For a single pair pass left[None], right[None].",
            )

    @property
    def shape(self) -> KronShape:
        return KronShape(*self.left.shape[1:], *self.right.shape[1:])

    @property
    def terms(self) -> int:
        return self.left.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every stored tensor: of A, then of B."""
        return factor_tensors(self.left) + factor_tensors(self.right)

    @property
    def parameters(self) -> int:
        return sum(t.numel() for t in self.tensors)

    def dense(self) -> Tensor:
        """The (out, in) matrix itself, in float32 at least. For small matrices and tests: it is out·in numbers."""
        a, b = _wide_alike(dense_factor(self.left), dense_factor(self.right))
        shape = self.shape
        blocks = (a.flatten(1).mT @ b.flatten(1)).view(shape.a1, shape.a2, shape.b1, shape.b2)  # R(W), see rearrange
        order = (2, 0, 1, 3) if self.rows == "shuffled" else (0, 2, 1, 3)
        return blocks.permute(order).reshape(shape.full)

    def apply(self, x: Tensor) -> Tensor:
        """W x along the last axis, without forming W: (..., in) -> (..., out).

        Row-major vec turns (A ⊗ B) vec(X) into vec(A X Bᵀ), with X of size (a2, b2). The result is in the widest
        type of A, B and x.
        """
        a, b, x = _alike(dense_factor(self.left), dense_factor(self.right), x)
        x = x.reshape(*x.shape[:-1], 1, self.shape.a2, self.shape.b2)
        y = (a @ (x @ b.mT)).sum(-3)  # (..., a1, b1)
        return (y.mT if self.rows == "shuffled" else y).flatten(-2)

    def map(self, change: Callable[[Tensor], Tensor]) -> KronTerms:
        """The same sum with every stored tensor changed."""
        return replace(self, left=map_factor(change, self.left), right=map_factor(change, self.right))

    def to(self, dtype: torch.dtype) -> KronTerms:
        """The same sum with every stored tensor in another dtype."""
        return self.map(lambda tensor: tensor.to(dtype))

    def scaled(self, weight: float) -> KronTerms:
        """weight · ΔW, with the weight in the first stored tensor (which becomes float32 at least)."""
        if isinstance(self.left, LowRank):
            return replace(self, left=LowRank(wide(self.left.up) * weight, self.left.down))
        return replace(self, left=wide(self.left) * weight)


class KronFit(NamedTuple):
    terms: KronTerms
    relative_error: float  # ‖W - Σ Aₖ ⊗ Bₖ‖ / ‖W‖, Frobenius; 0.0 for W = 0

    def to(self, dtype: torch.dtype) -> KronFit:
        """The same fit with its tensors in another dtype."""
        return self._replace(terms=self.terms.to(dtype))


def as_lora(up: Tensor, down: Tensor) -> KronTerms:
    """A LoRA as the Kronecker sum it is: up (out, r) · down (r, in) = [[1]] ⊗ (up·down).

    >>> as_lora(torch.ones(4, 2), torch.ones(2, 6)).dense().shape
    torch.Size([4, 6])
    """
    one = torch.ones(1, 1, 1, dtype=torch.promote_types(up.dtype, torch.float32), device=up.device)
    return KronTerms(one, LowRank(up[None], down[None]))


def rearrange(weight: Tensor, shape: KronShape) -> Tensor:
    """R(W): one row per (b1, b2) block of W, so that R(A ⊗ B) = vec(A) vec(B)ᵀ.

    (out, in) -> (a1·a2, b1·b2)
    """
    if tuple(weight.shape) != shape.full:
        raise ShapeError(
            f"{tuple(shape)} describes a matrix of size {shape.full}, but the weight is {tuple(weight.shape)}.",
            fix=f"Choose a1·b1 = {weight.shape[0]} and a2·b2 = {weight.shape[-1]}; "
            "krona_hub.kron.shapes.choices() lists the ones that fit.",
        )
    blocks = weight.reshape(shape.a1, shape.b1, shape.a2, shape.b2)
    return blocks.transpose(1, 2).reshape(shape.a1 * shape.a2, shape.b1 * shape.b2)


def nearest_kron(weight: Tensor, shape: KronShape | tuple[int, int], terms: int = 1) -> KronFit:
    """The sum of `terms` Kronecker products nearest to `weight` in the Frobenius norm.

    By Van Loan & Pitsianis (1993) this is the truncated SVD of R(W), and what is left out is
    the tail of its singular values. Each σₖ is shared evenly, so that ‖Aₖ‖ = ‖Bₖ‖ = √σₖ.
    `shape` is a KronShape, or the size (a1, a2) of A. Raises ShapeError where it does not divide.

    >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    >>> fit = nearest_kron(torch.kron(a, b), (1, 2))
    >>> torch.allclose(fit.terms.dense(), torch.kron(a, b)), fit.relative_error < 1e-6
    (True, True)
    """
    if len(shape) == 2:
        shape = split_of(weight, *shape)
    check_terms(shape, terms)
    u, s, vh = torch.linalg.svd(rearrange(wide(weight), shape), full_matrices=False)
    root = s[:terms].sqrt()
    left = (u[:, :terms] * root).mT.reshape(terms, shape.a1, shape.a2)
    right = (root[:, None] * vh[:terms]).reshape(terms, shape.b1, shape.b2)
    whole = torch.linalg.vector_norm(s)
    error = torch.linalg.vector_norm(s[terms:]) / whole if whole > 0 else whole
    return KronFit(KronTerms(left, right), float(error))


def split_of(weight: Tensor, a1: int, a2: int) -> KronShape:
    """The KronShape of a 2-D weight with A of (a1, a2). Raises ShapeError where it does not divide."""
    if weight.ndim != 2:
        raise ShapeError(
            f"a Kronecker split needs a matrix, but the weight is {tuple(weight.shape)}.",
            fix="Flatten a convolution from dimension 1: weight.flatten(1).",
        )
    return split((weight.shape[0], weight.shape[1]), a1, a2)


def check_terms(shape: KronShape, terms: int) -> None:
    """Raise ShapeError unless `terms` is between 1 and the number that already makes the sum exact."""
    if not 1 <= terms <= shape.max_terms:
        raise ShapeError(
            f"{terms} terms asked for, but {tuple(shape)} has room for 1 to {shape.max_terms}.",
            fix=f"With {shape.max_terms} the result is already exact.",
        )


def wide(tensor: Tensor) -> Tensor:
    """float32 at least: neither SVD nor exact products in half precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _wide_alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All in the widest of their types, float32 at least: products want equal types, and files mix them."""
    return _alike(*map(wide, tensors))


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(t.to(dtype) for t in tensors)
