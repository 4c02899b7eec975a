"""Rounding noise in the difference of two stored matrices, and the edge of its singular values.

A value stored with p bits has an error of up to half a unit in the last place (ulp), with mean square ulp²/12. The
singular values of a matrix of such errors end at the Marchenko–Pastur edge: √(Σ variances of a row) + √(Σ variances of
a column). Singular values above the edge are not rounding; those below it cannot be distinguished from rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import cos, pi, sin, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.kron.shapes import KronShape

SAMPLE = 1 << 12  # values checked before all others
FLUCTUATION = 4.0  # Tracy–Widom units above the edge, which about one noise matrix in ten thousand exceeds
TINY = 1e-300
STEPS = 512  # of the numerical integral over the Marchenko–Pastur law


class FloatFormat(NamedTuple):
    """The precision of a floating-point dtype."""

    bits: int  # of the significand, including the leading one
    smallest: int  # exponent of the smallest normal number

    @property
    def tiny(self) -> float:
        return 2.0**self.smallest


PRECISIONS = {
    torch.float8_e4m3fn: FloatFormat(4, -6),
    torch.float8_e5m2: FloatFormat(3, -14),
    torch.bfloat16: FloatFormat(8, -126),
    torch.float16: FloatFormat(11, -14),
    torch.float32: FloatFormat(24, -126),
    torch.float64: FloatFormat(53, -126),
}


def stored_dtype(values: Tensor) -> torch.dtype:
    """Return the dtype that the values were rounded to: float32 values that fit bfloat16 count as bfloat16.

    >>> stored_dtype(torch.tensor([1.0, 0.1])), stored_dtype(torch.tensor([1.0, 0.1]).bfloat16().float())
    (torch.float32, torch.bfloat16)
    """
    if values.dtype in (torch.float32, torch.float64):
        narrower = (t for t in (torch.bfloat16, torch.float16, torch.float32) if _fits(values, t))
        return next(narrower, values.dtype)
    return values.dtype


def _fits(values: Tensor, dtype: torch.dtype) -> bool:
    flat = values.flatten()
    return all(torch.equal(part.to(dtype).to(part.dtype), part) for part in (flat[:SAMPLE], flat[SAMPLE:]))


def ulp(values: Tensor, precision: FloatFormat) -> Tensor:
    """Return the distance from each value to the next representable one, in float32.

    >>> ulp(torch.tensor([1.0, 1.9, -4.0, 0.0]), PRECISIONS[torch.float16]).tolist()[:3]
    [0.0009765625, 0.0009765625, 0.00390625]
    """
    power = values.to(torch.float32, copy=True)
    power.view(torch.int32).bitwise_and_(0x7F800000)  # leaves 2^exponent, or 0 for a subnormal value
    return power.clamp_(min=precision.tiny).mul_(2.0 ** (1 - precision.bits))


@dataclass(frozen=True, eq=False)
class StorageNoise:
    """Rounding noise in the difference of two stored matrices of one size.

    The rounding of `tuned` always counts. The rounding of `base` counts as far as the singular values show it: it is
    absent if the tuned model was made from the stored base, and present if both were rounded independently.
    """

    tuned: Tensor  # (out, in), in the stored dtype
    base: Tensor

    @cached_property
    def ulps(self) -> Tensor:
        """Units in the last place of `tuned`, in float32."""
        return ulp(self.tuned, PRECISIONS[stored_dtype(self.tuned)])

    @cached_property
    def base_ulps(self) -> Tensor:
        return ulp(self.base, PRECISIONS[stored_dtype(self.base)])

    @cached_property
    def energy(self) -> float:
        """Expected squared Frobenius norm of the rounding of both matrices."""
        return _energy(self.ulps) + _energy(self.base_ulps)

    def explains(self, difference: Tensor) -> bool:
        """Return whether rounding alone can explain the difference of every value."""
        some = difference[:1].abs() <= (self.ulps[:1] + self.base_ulps[:1]) / 2
        return bool(some.all()) and bool((difference.abs() <= (self.ulps + self.base_ulps) / 2).all())

    def beyond(self, error: Tensor, first_row: int = 0) -> Tensor:
        """Return the part of an error on some rows that exceeds half an ulp of `tuned`."""
        return torch.add(error.abs(), self.ulps[first_row : first_row + len(error)], alpha=-0.5).clamp_(min=0)

    def floor(self, shape: KronShape, sigma: Tensor, energy: float) -> float:
        """Return the noise edge among the singular values of R(Δ), given sigma (k,), descending, and ‖Δ‖² = energy."""
        own = _sums(self.ulps, shape)
        beyond_own = _noise_of_tail(shape, sigma, energy) - float(own[0].sum())
        if beyond_own <= 0:
            return edge(*own)
        other = _sums(self.base_ulps, shape)
        share = min(1.0, beyond_own / max(float(other[0].sum()), TINY))
        return edge(*(a + share * b for a, b in zip(own, other, strict=True)))


def edge(rows: Tensor, columns: Tensor) -> float:
    """Return the largest expected singular value of noise with these sums of variances per row and column."""
    m, n = sorted((len(rows), len(columns)))
    return (sqrt(float(rows.max())) + sqrt(float(columns.max()))) * _above_edge(m, n)


def _noise_of_tail(shape: KronShape, sigma: Tensor, energy: float) -> float:
    """Estimate the energy of the noise from the energy outside of the largest quarter of the singular values."""
    m, n = sorted((shape.a1 * shape.a2, shape.b1 * shape.b2))
    head = min(len(sigma), m // 4)
    return max(0.0, energy - float(sigma[:head].square().sum())) / tail_share(m / n, head / m)


def _energy(ulps: Tensor) -> float:
    return float(torch.linalg.vector_norm(ulps)) ** 2 / 12


def _sums(ulps: Tensor, shape: KronShape) -> tuple[Tensor, Tensor]:
    """Return Σ ulp²/12 over each row and over each column of R."""
    variances = ulps.square().reshape(shape.a1, shape.b1, shape.a2, shape.b2)
    return variances.sum(3).sum(1).flatten() / 12, variances.sum(0).sum(1).flatten() / 12


def _above_edge(m: int, n: int) -> float:
    """Return the factor of the largest singular value of (m, n) noise above the edge (Johnstone, 2001)."""
    width = (m**-0.5 + n**-0.5) ** (1 / 3) / (sqrt(m) + sqrt(n))
    return sqrt(1 + FLUCTUATION * width)


@lru_cache(maxsize=256)
def tail_share(beta: float, head: float) -> float:
    """Return the share of energy of (m, n) noise, β = m/n ≤ 1, outside of the largest `head` of its singular values.

    >>> round(tail_share(1.0, 0.0), 3), round(tail_share(1e-9, 0.25), 2), round(tail_share(1.0, 0.25), 2)
    (1.0, 0.75, 0.38)
    """
    beta, whole, energy, left = max(beta, 1e-6), 0.0, 0.0, 0.0
    angles = [(i + 0.5) * pi / STEPS for i in range(STEPS)]  # x falls from (1 + √β)² to (1 − √β)²
    for angle in angles:
        x = 1 + beta + 2 * sqrt(beta) * cos(angle)
        weight = 2 * sin(angle) ** 2 / (x * STEPS)  # density of squared singular values
        whole += weight
        energy += weight * x
        left += weight * x if whole > head else 0.0
    return left / energy
