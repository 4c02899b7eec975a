"""The largest singular triples of a rearranged LoRA, by the cheapest of three methods.

    small R     its SVD
    many terms  the Gram matrix of its smaller side, and one step through R to undo the squaring
    few terms   block Krylov with full reorthogonalization, then the same step

Results are in float64, batched over layers. With every method the triples are those of R restricted to the computed
subspace, so Σσ² is the energy that these terms capture even if the last digits have not converged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from krona_hub.kron.rearrangement import Rearranged

SMALL = 96  # side of R up to which its SVD costs less than a Gram matrix
FEW = 4, 20  # Krylov for up to 4 terms, or if R has 20 rows per term; otherwise the Gram matrix costs less
TOLERANCE = {
    torch.float32: 2e-5,
    torch.float64: 1e-6,
}  # relative residual of a Ritz value; its error is the square of that
MOST_STEPS = 160  # of the Krylov space; layers that do not converge use the Gram matrix
CHECK_EVERY = 8  # vectors between two convergence checks, at least two steps
SEED = 0  # a fixed random start: equal input gives equal output


class Operator(Protocol):
    """n matrices of one size, accessed by products: R of LoRAs, or dense matrices."""

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
    """Singular triples, Σ σₖ leftₖ rightₖᵀ, the largest σ first."""

    left: Tensor  # (n, k, a1'·a2'), orthonormal
    sigma: Tensor  # (n, k)
    right: Tensor  # (n, k, b1'·b2'), orthonormal


def top_triples(op: Rearranged, k: int) -> Triples:
    """Return the k largest singular triples of R, or all if there are fewer."""
    m, n = op.shape
    k = min(k, m, n)
    if m > n:
        left, sigma, right = top_triples(op.T, k)
        return Triples(right, sigma, left)
    if m <= SMALL:
        u, s, vh = torch.linalg.svd(op.dense(), full_matrices=False)
        return Triples(u[..., :k].mT, s[:, :k], vh[:, :k])
    return _refined(op, leading_rows(op, k) if k <= max(FEW[0], m // FEW[1]) else _by_gram(op, k))


def _refined(op: Rearranged, basis: Tensor) -> Triples:
    """Return the triples of R on a subspace of its rows, basis (n, k, m), after one step of subspace iteration.

    The step applies R and Rᵀ one at a time and therefore works in σ, not in σ²: it turns a basis that is accurate to
    √eps into one that is accurate to eps wherever σₖ₊₁ is well below σₖ.
    """
    right = torch.linalg.qr(op.T.matmul(basis).mT).Q
    left, coupling = torch.linalg.qr(op.matmul(right.mT).mT)
    p, s, qh = torch.linalg.svd(coupling)
    return Triples((left @ p).mT, s, qh @ right.mT)


def _by_gram(op: Operator, k: int) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(op.gram()).eigenvectors
    return vectors[..., -k:].flip(-1).mT


def leading_rows(op: Operator, k: int) -> Tensor:
    """Return a basis (n, k, m) of the dominant left subspace, float64.

    float32 converges for almost every layer, and `_refined` restores the digits. If σₖ is too far below σ₁ for that,
    the layer is repeated in float64, and with the Gram matrix if that fails, too.
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
    """Fill `found` for the layers `waiting` as they converge, and return the layers that did not."""
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
    """A growing block Krylov space of R Rᵀ. The only object of this package that changes in place."""

    op: Operator
    basis: Tensor  # (n, room for j vectors, m), orthonormal
    projected: Tensor  # (n, j, j): basis · R Rᵀ · basisᵀ, lower triangle
    block: Tensor  # (n, k, m): the next vectors
    coupling: Tensor  # (n, k, k): their coupling to the previous vectors
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
        """Add one block: R Rᵀ applied to the newest one, orthogonalized against all previous ones."""
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
        """Return the k best vectors (n, k, m), and masks (n,) of the layers that converged and that only seem to.

        A Ritz value below the rounding error of the largest one has a small residual whatever its vector is. float32
        must leave such a layer to float64; beyond that, `_refined` corrects it.
        """
        values, vectors = torch.linalg.eigh(self.projected[:, : self.size, : self.size])  # uses the lower triangle
        values, vectors = values[:, -self.k :].flip(-1), vectors[..., -self.k :].flip(-1)
        residual, tolerance = (self.coupling.mT @ vectors[:, -self.k :]).norm(dim=1), TOLERANCE[values.dtype]
        noise = torch.finfo(values.dtype).eps * values[:, :1].clamp(min=0)
        settled = (residual <= torch.maximum(tolerance * values, noise)).all(1)
        buried = (tolerance * values < noise).any(1) & (values.dtype == torch.float32)
        return vectors.mT @ self.basis[:, : self.size], settled & ~buried, settled & buried


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Factor rows (n, k, m) = coupling · orthonormal rows; rows that are linearly dependent become zero."""
    if rows.shape[1] == 1:
        length = rows.norm(dim=2, keepdim=True)
        return rows / length.clamp(min=torch.finfo(rows.dtype).tiny), length
    q, r = torch.linalg.qr(rows.mT)
    size = r.diagonal(dim1=1, dim2=2).abs()
    alive = size > torch.finfo(r.dtype).tiny
    return q.mT * alive[..., None], r.mT
