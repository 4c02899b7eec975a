"""A delta as one product up·down through its narrowest middle, without any decomposition.

Every term A ⊗ B is a product of two sparse factors; with low-rank factors, A = u v and B = p q:

    (A ⊗ I)(I ⊗ B)   (I ⊗ B)(A ⊗ I)   (A ⊗ p)(I ⊗ q)   (I ⊗ p)(A ⊗ q)   (u ⊗ B)(v ⊗ I)   (u ⊗ I)(v ⊗ B)   (u ⊗ p)(v ⊗ q)

The narrowest is used, and the identity on the shorter side of ΔW if none is narrower. In contrast to singular vectors,
which are unique up to signs and rotations, the result is the same on every machine, so that second moments of the
middle can be stored in a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.kron.hadamard import expanded, is_hadamard
from krona_hub.kron.terms import Factor, KronTerms, LowRank, dense_factor


class Middle(NamedTuple):
    """Two matrices whose product is a delta."""

    up: Tensor  # (out, r)
    down: Tensor  # (r, in)


def middle_of(sums: Sequence[KronTerms], size: tuple[int, int]) -> Middle:
    """Return the delta of Kronecker sums as up·down with r ≤ min(out, in).

    A LoRA returns its own factors.

    Parameters
    ----------
    sums : sequence of KronTerms
        The sums, each of full size (out, in).
    size : (out, in)

    Examples
    --------
    >>> from krona_hub.kron.terms import as_lora
    >>> middle_of([as_lora(torch.ones(4, 2), torch.ones(2, 6))], (4, 6)).down.shape
    torch.Size([2, 6])
    >>> middle_of([KronTerms(torch.ones(1, 2, 2), torch.ones(1, 3, 1))], (6, 2)).up.shape
    torch.Size([6, 2])
    """
    pieces = [piece for s in sums for piece in _pieces(expanded(s) if is_hadamard(s) else s)]
    inner = sum(piece.up.shape[1] for piece in pieces)
    if pieces and inner < min(size):
        return Middle(_joined([p.up for p in pieces], 1), _joined([p.down for p in pieces], 0))
    if len(pieces) == 1 and inner == min(size):
        return pieces[0]
    return _through_identity(sums, size)


def _through_identity(sums: Sequence[KronTerms], size: tuple[int, int]) -> Middle:
    out, in_ = size
    whole = torch.zeros(size, dtype=torch.float64)
    for s in sums:
        whole = whole + s.dense().double()
    eye = torch.eye(min(size), dtype=torch.float64)
    return Middle(eye, whole) if out <= in_ else Middle(whole, eye)


def _pieces(s: KronTerms) -> list[Middle]:
    if s.rows != "kron" and 1 not in (s.shape.a1, s.shape.b1):
        return [_through_identity([s], s.shape.full)]
    return [_term(_nth(s.left, k), _nth(s.right, k)) for k in range(s.terms)]


def _nth(factor: Factor, k: int) -> Tensor | tuple[Tensor, Tensor]:
    """Return factor k of a stack as a matrix, or as its two factors."""
    return (factor.up[k], factor.down[k]) if isinstance(factor, LowRank) else dense_factor(factor)[k]


def _term(a: Tensor | tuple[Tensor, Tensor], b: Tensor | tuple[Tensor, Tensor]) -> Middle:
    """Return one term A ⊗ B through its narrowest middle."""
    options = [(left, right) for left in _splits(a) for right in _splits(b)]
    (u, v), (p, q) = min(options, key=lambda option: option[0][0].shape[1] * option[1][0].shape[1])
    return Middle(_kron(u, p), _kron(v, q))


def _splits(factor: Tensor | tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the products that equal a factor: its own two factors, or itself beside the identity."""
    if isinstance(factor, tuple):
        return [factor]
    rows, columns = factor.shape
    return [(factor, torch.eye(columns).to(factor)), (torch.eye(rows).to(factor), factor)]


def _kron(a: Tensor, b: Tensor) -> Tensor:
    if a.numel() == 1 and float(a) == 1:
        return b
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    product = a.to(dtype)[:, None, :, None] * b.to(dtype)[None, :, None, :]  # torch.kron fails for some strides
    return product.reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])


def _joined(matrices: Sequence[Tensor], dim: int) -> Tensor:
    if len(matrices) == 1:
        return matrices[0]
    dtype = matrices[0].dtype
    for matrix in matrices:
        dtype = torch.promote_types(dtype, matrix.dtype)
    return torch.cat([matrix.to(dtype) for matrix in matrices], dim)
