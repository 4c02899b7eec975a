"""Nearest Kronecker sums of dense matrices, such as the difference of two checkpoints.

    Δ ≈ Σₖ Aₖ ⊗ Bₖ     the truncated SVD of R(Δ): (a1·a2, b1·b2), by Van Loan & Pitsianis (1993)

The singular vectors of the smaller side, of length m, are computed by the cheaper of two methods:

    small side or many terms   the Gram matrix of that side, in float64, whose eigenvalues are all σ²
    few terms                  block Krylov

One product with R gives the other side. Because the vectors are orthonormal, the squared error is
‖Δ‖² − Σ‖R·vector‖², however accurate they are. Everything is batched over matrices of one size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from krona_hub.errors import ShapeError
from krona_hub.kron.hadamard import Hadamard
from krona_hub.kron.krylov import leading_rows
from krona_hub.kron.shapes import KronShape, split
from krona_hub.kron.terms import KronFit, KronTerms, LowRank, check_terms, dense_factor

CHUNK = 1 << 21  # values converted to float64 at once: 16 MiB
SMALL = 512  # side up to which the Gram matrix is always cheap
FEW = 16  # Krylov if R has at least this many rows per term
PROBES = 12  # random vectors for a first estimate of a spectrum
CANCELLED = 1e-6  # squared relative error below which ‖Δ‖² − Σσ² has too few digits left


@dataclass(frozen=True, eq=False)
class DenseMatrix:
    """n dense matrices of one size, as an operator for `krylov.py`."""

    values: Tensor  # (n, rows, columns)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[1], self.values.shape[2]

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def T(self) -> DenseMatrix:
        return DenseMatrix(self.values.mT)

    def matmul(self, x: Tensor) -> Tensor:
        """(n, k, columns) -> (n, k, rows)"""
        return x @ self.values.mT

    def gram(self) -> Tensor:
        """M Mᵀ in float64: (n, rows, rows)"""
        total = torch.zeros(self.count, self.shape[0], self.shape[0], dtype=torch.float64, device=self.device)
        for part in self.columns():
            total.baddbmm_(part, part.mT)
        return total

    def columns(self) -> Iterator[Tensor]:
        """Yield blocks of columns in float64."""
        step = max(1, CHUNK // (self.count * self.shape[0]))
        for start in range(0, self.shape[1], step):
            yield self.values[:, :, start : start + step].double()

    def project(self, vectors: Tensor) -> Tensor:
        """vectors (n, k, rows) · M in float64: (n, k, columns)"""
        return torch.cat([vectors @ part for part in self.columns()], 2)

    def take(self, index: Tensor) -> DenseMatrix:
        return DenseMatrix(self.values[index])

    def to(self, dtype: torch.dtype) -> DenseMatrix:
        return DenseMatrix(self.values.to(dtype))


@dataclass(frozen=True, eq=False)
class RearrangedDense:
    """R(Δ) of n matrices, its smaller side first."""

    matrix: DenseMatrix  # (n, m, m'), m ≤ m'
    shape: KronShape
    flipped: bool  # whether the rows belong to B

    @classmethod
    def of(cls, weights: Tensor, shape: KronShape) -> RearrangedDense:
        """Rearrange weights (n, out, in), at least float32."""
        flipped = shape.a1 * shape.a2 > shape.b1 * shape.b2
        blocks = weights.reshape(-1, shape.a1, shape.b1, shape.a2, shape.b2)
        rows, columns = ((2, 4), (1, 3)) if flipped else ((1, 3), (2, 4))
        return cls(DenseMatrix(blocks.permute(0, *rows, *columns).flatten(3, 4).flatten(1, 2)), shape, flipped)

    @cached_property
    def energy(self) -> Tensor:
        """‖Δ‖² of each matrix, (n,), float64."""
        return torch.stack([part.square().sum((1, 2)) for part in self.matrix.columns()]).sum(0)

    def spectrum(self) -> DenseSpectrum:
        """Compute all singular values and vectors by the Gram matrix."""
        gram = self.matrix.gram()
        squares, vectors = torch.linalg.eigh(gram)
        energy = gram.diagonal(dim1=1, dim2=2).sum(1)
        return DenseSpectrum(self, squares.clamp_(min=0).sqrt_().flip(1), vectors.mT.flip(1), energy)

    def leading(self, terms: int) -> DenseSpectrum:
        """Compute the largest `terms` singular values and vectors by the cheaper method."""
        m = self.matrix.shape[0]
        if m <= SMALL or m < FEW * terms:
            return self.spectrum().first(terms)
        vectors = torch.linalg.qr(leading_rows(self.matrix, terms).mT).Q.mT
        sigma = torch.linalg.vector_norm(self.matrix.project(vectors), dim=2)
        return DenseSpectrum(self, sigma, vectors, self.energy)

    def concentration(self) -> float:
        """Estimate (Σσ²)² / Σσ⁴, the effective number of terms, by a few random vectors."""
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(1, PROBES, self.matrix.shape[0], generator=generator).to(self.matrix.values)
        images = self.matrix.matmul(self.matrix.T.matmul(probes))
        fourth = float(images.double().square().sum()) / PROBES
        return float(self.energy.sum()) ** 2 / fourth if fourth else 0.0


@dataclass(frozen=True, eq=False)
class DenseSpectrum:
    """The largest singular values of R(Δ), with their vectors on the smaller side of R."""

    source: RearrangedDense
    sigma: Tensor  # (n, k), descending, float64
    vectors: Tensor  # (n, k, m), orthonormal
    energy: Tensor  # (n,), ‖Δ‖², float64

    def first(self, terms: int) -> DenseSpectrum:
        return DenseSpectrum(self.source, self.sigma[:, :terms], self.vectors[:, :terms], self.energy)

    def left_out(self) -> Tensor:
        """Return ‖Δ − sum of the first 0, 1, … k terms‖², (n, k + 1), clamped at zero."""
        kept = torch.cat([torch.zeros_like(self.sigma[:, :1]), self.sigma.square().cumsum(1)], 1)
        return (self.energy[:, None] - kept).clamp(min=0)

    def sums(self) -> list[KronTerms]:
        """Return the Kronecker sums of these terms in float64, with each σ shared evenly."""
        images = self.source.matrix.project(self.vectors)  # σ times the vectors of the other side
        root = torch.linalg.vector_norm(images, dim=2, keepdim=True).sqrt()
        near, far = self.vectors * root, images / root.where(root > 0, 1.0)
        left, right = (far, near) if self.source.flipped else (near, far)
        a1, a2, b1, b2 = self.source.shape
        factors = zip(left.reshape(len(left), -1, a1, a2), right.reshape(len(right), -1, b1, b2), strict=True)
        return [KronTerms(*ab) for ab in factors]

    def errors(self) -> list[float]:
        """Return the relative error of each sum; 0.0 for a zero matrix."""
        missing = self.left_out()[:, -1]
        if bool((missing < CANCELLED * self.energy).any()):
            missing = self._residual()
        return [float(e) for e in (missing / self.energy.where(self.energy > 0, 1.0)).sqrt()]

    def _residual(self) -> Tensor:
        """Return ‖M − vectorsᵀ·vectors·M‖², (n,), without cancellation."""
        total = torch.zeros_like(self.energy)
        for part in self.source.matrix.columns():
            total += (part - self.vectors.mT @ (self.vectors @ part)).square().sum((1, 2))
        return total


def nearest_kron_of_dense(weights: Tensor, shape: KronShape | tuple[int, int], terms: int = 1) -> list[KronFit]:
    """Return the nearest sum of `terms` Kronecker products for each of n matrices: weights (n, out, in).

    Like `nearest_kron`, but via the smaller side of R(Δ) and for many matrices at once. Factors are at least float32;
    errors are those of the returned factors. Raises ShapeError if the shape does not divide the weights.

    >>> fit = nearest_kron_of_dense(torch.kron(torch.eye(3), torch.ones(2, 4))[None], (3, 3))[0]
    >>> fit.relative_error < 1e-7, fit.terms.shape.full
    (True, (6, 12))
    """
    if weights.ndim != 3:
        raise ShapeError(
            f"the weights have shape {tuple(weights.shape)}, expected (n, out, in).",
            fix="Pass weight[None] for a single weight.",
        )
    shape = split((weights.shape[1], weights.shape[2]), shape[0], shape[1])
    check_terms(shape, terms)
    dtype = torch.promote_types(weights.dtype, torch.float32)
    found = RearrangedDense.of(weights.to(dtype), shape).leading(terms)
    return [KronFit(s.to(dtype), e) for s, e in zip(found.sums(), found.errors(), strict=True)]


def dense_rows(terms: KronTerms, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield ΔW from top to bottom in blocks of rows, (rows, in) each; one matrix product gives b1 rows.

    >>> terms = KronTerms(torch.rand(2, 3, 2), torch.rand(2, 4, 5))
    >>> torch.allclose(torch.cat(list(dense_rows(terms, torch.float32))), terms.dense())
    True
    """
    a1, a2, b1, b2 = terms.shape
    wide = terms.to(dtype)
    left, right = wide.left, wide.right
    if isinstance(right, LowRank) and not isinstance(right, Hadamard) and a1 == a2 == 1:
        for rows in torch.split(right.up * dense_factor(left), max(1, CHUNK // b2), 1):
            yield (rows @ right.down).sum(0)
        return
    a, b = dense_factor(left), dense_factor(right).flatten(1)  # (k, a1, a2), (k, b1·b2)
    step = max(1, CHUNK // (b1 * a2 * b2))
    for part in torch.split(a, step, 1):
        blocks = part.flatten(1).mT @ b  # (rows of A · a2, b1·b2)
        yield blocks.reshape(-1, a2, b1, b2).transpose(1, 2).reshape(-1, a2 * b2)
