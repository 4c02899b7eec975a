"""Sums of Kronecker products, and the nearest such sum of a given matrix.

    ΔW = Σₖ Aₖ ⊗ Bₖ     ΔW: (out, in)   Aₖ: (a1, a2)   Bₖ: (b1, b2)   out = a1·b1   in = a2·b2

The letters are those of DiffuseKronA and have the same meaning throughout krona_hub; the nearest sum is that of
Van Loan & Pitsianis, "Approximation with Kronecker Products" (1993). Either factor can itself be low-rank,
A = up·down: a LoRA is [[1]] ⊗ (up·down). This module deals with tensors only: no files, layer names or alpha. The
scale of a file is already folded into the factors.
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
    """A stack of matrices stored as low-rank products: matrix k is up[k] @ down[k]."""

    up: Tensor  # (terms, p, r)
    down: Tensor  # (terms, r, q)

    def __post_init__(self) -> None:
        fits = self.up.ndim == self.down.ndim == 3 and self.up.shape[0] == self.down.shape[0]
        if not fits or self.up.shape[2] != self.down.shape[1]:
            raise ShapeError(
                f"up {tuple(self.up.shape)} and down {tuple(self.down.shape)} must be (terms, p, r) and "
                "(terms, r, q) with equal terms and equal r.",
                fix="For a single pair pass up[None], down[None].",
            )

    @property
    def shape(self) -> torch.Size:
        """(terms, p, q), the shape of the products."""
        return torch.Size((*self.up.shape[:2], self.down.shape[2]))

    @property
    def rank(self) -> int:
        """The inner dimension r of the products."""
        return self.up.shape[2]

    @property
    def depth(self) -> int:
        """Multiplications per value of the matrices."""
        return self.rank

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The stored tensors: (up, down)."""
        return self.up, self.down

    def dense(self) -> Tensor:
        """Return the products, (terms, p, q), in the wider of the two dtypes, at least float32."""
        up, down = _wide_alike(self.up, self.down)
        return up @ down

    def map(self, change: Callable[[Tensor], Tensor]) -> LowRank:
        """Apply `change` to every stored tensor."""
        return self.map_sides(change, change)

    def map_sides(self, up: Callable[[Tensor], Tensor], down: Callable[[Tensor], Tensor] = lambda t: t) -> LowRank:
        """Apply functions to up and to down, such as one that selects or repeats rows of every matrix."""
        return LowRank(up(self.up), down(self.down))

    def map_up(self, change: Callable[[Tensor], Tensor]) -> LowRank:
        """Apply a linear `change` of values, such as a multiplication: it acts on one tensor, hence on the product."""
        return LowRank(change(self.up), self.down)

    def transposed(self) -> LowRank:
        """Return the stack of transposed matrices."""
        return LowRank(self.down.mT, self.up.mT)


Factor = Tensor | LowRank  # (terms, p, q), stored or as a product


def dense_factor(factor: Factor) -> Tensor:
    """Return the values (terms, p, q) of a factor; a low-rank factor is at least float32."""
    return factor.dense() if isinstance(factor, LowRank) else factor


def map_factor(change: Callable[[Tensor], Tensor], factor: Factor) -> Factor:
    """Apply `change` to every stored tensor of a factor: to itself, or to those of its product.

    >>> map_factor(Tensor.double, LowRank(torch.ones(1, 4, 2), torch.ones(1, 2, 6))).up.dtype
    torch.float64
    """
    return factor.map(change) if isinstance(factor, LowRank) else change(factor)


def transpose_factor(factor: Factor) -> Factor:
    """Transpose every matrix of the stack: (terms, p, q) -> (terms, q, p)."""
    return factor.transposed() if isinstance(factor, LowRank) else factor.mT


def stored_rank(factor: Factor) -> int | None:
    """Return the rank of a factor stored as up·down; None for a dense factor."""
    return factor.rank if isinstance(factor, LowRank) else None


def rank_bound(factor: Factor) -> int:
    """Return an upper bound of the rank of each matrix of the stack."""
    small = min(factor.shape[1:])
    return min(small, factor.rank) if isinstance(factor, LowRank) else small


def factor_tensors(factor: Factor) -> tuple[Tensor, ...]:
    """Return the stored tensors of a factor: itself, or those of its product."""
    return factor.tensors if isinstance(factor, LowRank) else (factor,)


@dataclass(frozen=True, eq=False)
class KronTerms:
    """A Kronecker sum Σₖ Aₖ ⊗ Bₖ of size (a1·b1, a2·b2), stored as its factors.

    Raises ShapeError if the factors are not three-dimensional or differ in the number of terms.

    Parameters
    ----------
    left, right : Tensor or LowRank
        The factors Aₖ, (terms, a1, a2), and Bₖ, (terms, b1, b2).
    rows : {"kron", "shuffled"}, default "kron"
        Row order of the sum. In the order of DiffuseKronA, "shuffled", row i1·a1 + j1 of W is row j1·b1 + i1 of
        A ⊗ B (FORMATS.md §8): the blocks are interleaved.

    Examples
    --------
    >>> w = KronTerms(torch.ones(2, 3, 2), torch.ones(2, 4, 5))
    >>> str(w.shape), w.terms, w.parameters, tuple(w.dense().shape)
    ('3x2 ⊗ 4x5', 2, 52, (12, 10))
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
        """Shape of each term."""
        (_, a1, a2), (_, b1, b2) = self.left.shape, self.right.shape
        return KronShape(a1, a2, b1, b2)

    @property
    def terms(self) -> int:
        """Number of terms."""
        return self.left.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All stored tensors: those of A, then those of B."""
        return factor_tensors(self.left) + factor_tensors(self.right)

    @property
    def parameters(self) -> int:
        """Number of stored values."""
        return sum(t.numel() for t in self.tensors)

    def dense(self) -> Tensor:
        """Return the (out, in) matrix, at least float32. For small matrices and tests only: it has out·in values."""
        a, b = _wide_alike(dense_factor(self.left), dense_factor(self.right))
        shape = self.shape
        blocks = (a.flatten(1).mT @ b.flatten(1)).view(shape.a1, shape.a2, shape.b1, shape.b2)  # R(W), see rearrange
        order = (2, 0, 1, 3) if self.rows == "shuffled" else (0, 2, 1, 3)
        return blocks.permute(order).reshape(shape.full)

    def apply(self, x: Tensor) -> Tensor:
        """Return W x along the last axis, without forming W: (..., in) -> (..., out).

        With row-major vec, (A ⊗ B) vec(X) = vec(A X Bᵀ) for X of size (a2, b2). The result has the widest dtype of A, B
        and x.
        """
        a, b, x = _alike(dense_factor(self.left), dense_factor(self.right), x)
        x = x.reshape(*x.shape[:-1], 1, self.shape.a2, self.shape.b2)
        y = (a @ (x @ b.mT)).sum(-3)  # (..., a1, b1)
        return (y.mT if self.rows == "shuffled" else y).flatten(-2)

    def map(self, change: Callable[[Tensor], Tensor]) -> KronTerms:
        """Apply `change` to every stored tensor."""
        return replace(self, left=map_factor(change, self.left), right=map_factor(change, self.right))

    def to(self, dtype: torch.dtype) -> KronTerms:
        """Convert every stored tensor to another dtype."""
        return self.map(lambda tensor: tensor.to(dtype))

    def scaled(self, weight: float) -> KronTerms:
        """Return weight · ΔW; the weight is folded into the first stored tensor, which becomes at least float32."""
        if isinstance(self.left, LowRank):
            return replace(self, left=self.left.map_up(lambda up: wide(up) * weight))
        return replace(self, left=wide(self.left) * weight)


class KronFit(NamedTuple):
    """A fitted Kronecker sum and its relative error."""

    terms: KronTerms
    relative_error: float  # ‖W - Σ Aₖ ⊗ Bₖ‖ / ‖W‖, Frobenius; 0.0 for W = 0

    def to(self, dtype: torch.dtype) -> KronFit:
        """Convert the tensors of the fit to another dtype."""
        return self._replace(terms=self.terms.to(dtype))


def as_lora(up: Tensor, down: Tensor) -> KronTerms:
    """Express a LoRA as a Kronecker sum: up (out, r) · down (r, in) = [[1]] ⊗ (up·down).

    >>> as_lora(torch.ones(4, 2), torch.ones(2, 6)).dense().shape
    torch.Size([4, 6])
    """
    one = torch.ones(1, 1, 1, dtype=torch.promote_types(up.dtype, torch.float32), device=up.device)
    return KronTerms(one, LowRank(up[None], down[None]))


def rearrange(weight: Tensor, shape: KronShape) -> Tensor:
    """Return R(W) with one row per (b1, b2) block of W, so that R(A ⊗ B) = vec(A) vec(B)ᵀ.

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
    """Return the sum of `terms` Kronecker products nearest to `weight` in the Frobenius norm.

    It is the truncated SVD of R(W) (Van Loan & Pitsianis, 1993), and its error is the tail of the singular values. Each
    σₖ is shared evenly: ‖Aₖ‖ = ‖Bₖ‖ = √σₖ.

    Parameters
    ----------
    weight : Tensor
        The matrix, (out, in); flatten convolutions with ``weight.flatten(1)``.
    shape : KronShape or tuple of int
        The shape of each term, or the size (a1, a2) of A.
    terms : int, default 1
        Number of products, at most min(a1·a2, b1·b2).

    Returns
    -------
    KronFit
        ``terms``, the sum, at least float32; ``relative_error``, ‖W − Σ Aₖ ⊗ Bₖ‖ / ‖W‖.

    Raises
    ------
    ShapeError
        If the shape does not divide the weight, or `terms` is out of range.

    Examples
    --------
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
    """Return the KronShape of a 2-D weight with A of size (a1, a2). Raises ShapeError if it does not divide."""
    if weight.ndim != 2:
        raise ShapeError(
            f"a Kronecker split needs a matrix, but the weight is {tuple(weight.shape)}.",
            fix="Flatten a convolution from dimension 1: weight.flatten(1).",
        )
    return split((weight.shape[0], weight.shape[1]), a1, a2)


def check_terms(shape: KronShape, terms: int) -> None:
    """Raise ShapeError unless `terms` is between 1 and the number at which the sum is exact."""
    if not 1 <= terms <= shape.max_terms:
        raise ShapeError(
            f"invalid number of terms {terms}: {tuple(shape)} holds 1 to {shape.max_terms}.",
            fix=f"With {shape.max_terms} the result is already exact.",
        )


def wide(tensor: Tensor) -> Tensor:
    """Convert to at least float32, since half precision supports neither SVD nor exact products."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _wide_alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert all to their widest dtype, at least float32: products need equal dtypes, and files mix them."""
    return _alike(*map(wide, tensors))


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(t.to(dtype) for t in tensors)
