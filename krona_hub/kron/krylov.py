"""The largest singular triples of a rearranged LoRA, by the cheapest of three ways.

    small R     its SVD
    many terms  the Gram matrix of its smaller side, and one step through R to undo the squaring
    few terms   block Krylov with full reorthogonalisation, then the same step

All in float64, batched over layers. Whatever the way, the triples are those of R restricted to the subspace found,
so that Σσ² is what these terms capture even before the last digit has converged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from krona_hub.kron.rearrangement import Rearranged

SMALL = 96  # side of R up to which its SVD costs less than a Gram matrix
FEW = 4, 20  # Krylov for 4 terms, and for more where R has 20 rows for each: above it the Gram matrix costs less
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-6}  # residual of a Ritz value, relative; its error is the square
MOST_STEPS = 160  # of the Krylov space; what has not converged by then goes through the Gram matrix
CHECK_EVERY = 8  # vectors between two looks at convergence, and two steps at least
SEED = 0  # the start is random but always the same: equal input, equal output


class Operator(Protocol):
    """n matrices of one size, known by their products: R of LoRAs, or stored whole."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def count(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def T(self) -> Operator: ...
    def matmul(self, x: Tensor) -> Tensor: ...
    def gram(self) -> Tensor: ...
    def take(self, index: Tensor) -> Operator: ...
    def to(self, dtype: torch.dtype) -> Operator: ...


class Triples(NamedTuple):
    """Σ σₖ leftₖ rightₖᵀ, the largest σ first."""

    left: Tensor  # (n, k, a1'·a2'), orthonormal
    sigma: Tensor  # (n, k)
    right: Tensor  # (n, k, b1'·b2'), orthonormal


def top_triples(op: Rearranged, k: int) -> Triples:
    """The k largest singular triples of R, or all where there are fewer."""
    m, n = op.shape
    k = min(k, m, n)
    if m > n:
        left, sigma, right = top_triples(op.T, k)
        return Triples(right, sigma, left)
    if m <= SMALL:
        u, s, vh = torch.linalg.svd(op.dense(), full_matrices=False)
        return Triples(u[..., :k].mT, s[:, :k], vh[:, :k])
    return _through(op, leading_rows(op, k) if k <= max(FEW[0], m // FEW[1]) else _by_gram(op, k))


def _through(op: Rearranged, basis: Tensor) -> Triples:
    """The triples of R on a subspace of its rows, basis (n, k, m), after one step of subspace iteration.

    The step goes through R and Rᵀ one at a time and so works in σ and not in σ²: it turns a basis that is
    good to √eps into one that is good to eps wherever σₖ₊₁ is well below σₖ.
    """
    right = torch.linalg.qr(op.T.matmul(basis).mT).Q
    left, coupling = torch.linalg.qr(op.matmul(right.mT).mT)
    p, s, qh = torch.linalg.svd(coupling)
    return Triples((left @ p).mT, s, qh @ right.mT)


def _by_gram(op: Operator, k: int) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(op.gram()).eigenvectors
    return vectors[..., -k:].flip(-1).mT


def leading_rows(op: Operator, k: int) -> Tensor:
    """A basis (n, k, m) of the dominant left subspace, float64.

    float32 finds it for nearly every layer, and `_through` repairs the digits; where σₖ is too far below σ₁ for
    that, float64 does it again, and the Gram matrix does what neither could.
    """
    found = torch.empty(op.count, k, op.shape[0], dtype=torch.float64, device=op.device)
    waiting = torch.arange(op.count, device=op.device)
    for dtype in (torch.float32, torch.float64):
        waiting = _krylov_in(dtype, op, waiting, found)
        if not len(waiting):
            return found
    found[waiting] = _by_gram(op.take(waiting), k)
    return found


def _krylov_in(dtype: torch.dtype, op: Operator, waiting: Tensor, found: Tensor) -> Tensor:
    """Fill `found` for the layers `waiting` as they converge, and return those that did not."""
    space, again = _Space.start(op.take(waiting).to(dtype), found.shape[1], dtype), []
    while space.room:
        space.grow()
        if space.steps % max(2, CHECK_EVERY // space.k) and space.room:
            continue
        vectors, converged, buried = space.ritz()
        found[waiting[converged]] = vectors[converged].to(found.dtype)
        again.append(waiting[buried])
        waiting, rest = waiting[~(converged | buried)], ~(converged | buried)
        if not len(waiting):
            break
        space = space if rest.all() else space.take(rest)
    return torch.cat([*again, waiting])


@dataclass(eq=False)
class _Space:
    """A block Krylov space of R Rᵀ under construction. The one object of this package that changes in place."""

    op: Operator
    basis: Tensor  # (n, room for j vectors, m), orthonormal
    projected: Tensor  # (n, j, j): basis · R Rᵀ · basisᵀ, lower triangle
    block: Tensor  # (n, k, m): the vectors that come next
    coupling: Tensor  # (n, k, k): how strongly they are tied to those before
    steps: int = 0

    @classmethod
    def start(cls, op: Operator, k: int, dtype: torch.dtype) -> _Space:
        (n, m), limit = (op.count, op.shape[0]), k * min(op.shape[0] // (2 * k), MOST_STEPS)
        random = torch.randn(k, m, generator=torch.Generator().manual_seed(SEED), dtype=dtype).to(op.device)
        block = torch.linalg.qr(random.mT).Q.mT.expand(n, k, m)
        none = block.new_zeros(n, limit, limit)
        return cls(op, block.new_zeros(n, limit, m), none, block, none[:, :k, :k])

    @property
    def k(self) -> int:
        return self.block.shape[1]

    @property
    def size(self) -> int:
        return self.steps * self.k

    @property
    def room(self) -> bool:
        return self.size < self.basis.shape[1]

    def take(self, layers: Tensor) -> _Space:
        parts = (self.basis[layers], self.projected[layers], self.block[layers], self.coupling[layers])
        return _Space(self.op.take(layers), *parts, steps=self.steps)

    def grow(self) -> None:
        """One block more: R Rᵀ of the newest, freed from all before it."""
        self.basis[:, self.size : self.size + self.k] = self.block
        image = self.op.matmul(self.op.T.matmul(self.block))
        self.steps += 1
        basis = self.basis[:, : self.size]
        shares = image @ basis.mT
        self.projected[:, self.size - self.k : self.size, : self.size] = shares
        image = image - shares @ basis
        image = image - (image @ basis.mT) @ basis  # twice is enough (Kahan, Parlett)
        self.block, self.coupling = _orthonormal(image)
        self.block = self.block - (self.block @ basis.mT) @ basis

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """The k best vectors of the space, (n, k, m); which layers have converged, (n,), and which only seem to.

        A Ritz value below the rounding of the largest has a small residual whatever its vector is. float32 must
        leave such a layer to float64; beyond that `_through` is what helps.
        """
        values, vectors = torch.linalg.eigh(self.projected[:, : self.size, : self.size])  # of the lower triangle
        values, vectors = values[:, -self.k :].flip(-1), vectors[..., -self.k :].flip(-1)
        residual, tolerance = (self.coupling.mT @ vectors[:, -self.k :]).norm(dim=1), TOLERANCE[values.dtype]
        noise = torch.finfo(values.dtype).eps * values[:, :1].clamp(min=0)
        settled = (residual <= torch.maximum(tolerance * values, noise)).all(1)
        buried = (tolerance * values < noise).any(1) & (values.dtype == torch.float32)
        return vectors.mT @ self.basis[:, : self.size], settled & ~buried, settled & buried


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, k, m) = coupling · orthonormal rows; zero where there is nothing left to orthonormalise."""
    if rows.shape[1] == 1:
        length = rows.norm(dim=2, keepdim=True)
        return rows / length.clamp(min=torch.finfo(rows.dtype).tiny), length
    q, r = torch.linalg.qr(rows.mT)
    size = r.diagonal(dim1=1, dim2=2).abs()
    alive = size > torch.finfo(r.dtype).tiny
    return q.mT * alive[..., None], r.mT
