"""Estimate the strengths at which adapters were merged into a tensor, by least squares over a sample of its values.

    M − W ≈ Σᵢ sᵢ·ΔWᵢ     M: merged   W: base   sᵢ: strengths to estimate

Rounding to nearest is not noise here: W lies on the grid of its dtype, and a delta below half a unit is lost entirely.
The strengths are therefore those s for which round(W + Σ s·ΔW) has the same components along the deltas as M; after
stochastic rounding, whose mean is the true sum, they are those of the sum itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import nan

import torch
from torch import Tensor

from krona_hub.merging.arithmetic.patches import Patch
from krona_hub.merging.arithmetic.rounding import Rounding
from krona_hub.merging.arithmetic.tiles import merge_tensor
from krona_hub.verification.ulps import unit

MOST = 1 << 18  # sampled values of a tensor: enough for three digits of a strength, with bounded memory
STEPS = 30  # of the iteration for s; each reduces the error several times
NEAR = 0.01  # relative; strengths this close to the requested ones match
SIGMAS = 5  # beyond which stochastic rounding does not explain a different strength
NEARLY_ALL = 0.99  # share of values that rounding to nearest must reproduce to be accepted as the mode


@dataclass(frozen=True, eq=False)
class WeightSample:
    """Sampled values of a tensor: base, merged, and the delta of each adapter at strength 1."""

    base: Tensor  # (m,), float64
    merged: Tensor  # (m,), in its stored dtype
    deltas: Tensor  # (n, m), float64

    @cached_property
    def gram(self) -> Tensor:
        """⟨ΔWᵢ, ΔWⱼ⟩, (n, n)."""
        return self.deltas @ self.deltas.mT

    @cached_property
    def change(self) -> Tensor:
        """M − W, (m,)."""
        return self.merged.double() - self.base

    @cached_property
    def unit(self) -> Tensor:
        """One unit in the last place of each merged number, (m,)."""
        return unit(self.merged)

    @property
    def present(self) -> Tensor:
        """Which adapters have a delta here, (n,)."""
        return self.gram.diagonal() > 0

    def sum_at(self, strengths: Tensor) -> Tensor:
        """Return W + Σ s·ΔW, (m,)."""
        return self.base + strengths @ self.deltas

    def rounded_at(self, strengths: Tensor) -> Tensor:
        """Return round(W + Σ s·ΔW), to nearest, in float64, (m,)."""
        return self.sum_at(strengths).to(self.merged.dtype).double()

    def along(self, change: Tensor) -> Tensor:
        """Return the strengths whose sum is nearest to a change, (n,)."""
        found: Tensor = torch.linalg.lstsq(self.gram, (self.deltas @ change)[:, None], driver="gelsd").solution
        return found[:, 0]

    def residual(self, strengths: Tensor) -> float:
        """Return ‖M − W − Σ s·ΔW‖."""
        return float((self.merged.double() - self.sum_at(strengths)).norm())

    def explains(self, strengths: Tensor) -> bool:
        """Return whether rounding by at most 1 ULP per value explains the residual."""
        return self.residual(strengths) <= float(self.unit.norm())


def sample(weight: Tensor, merged: Tensor, patches: Sequence[Sequence[Patch]]) -> WeightSample:
    """Sample the finite values of a stored tensor; `patches[i]` belong to adapter i, at strength 1."""
    indices = torch.arange(0, weight.numel(), -(-weight.numel() // MOST))
    sound = weight.reshape(-1)[indices].double().isfinite() & merged.reshape(-1)[indices].double().isfinite()
    indices = indices[sound]
    rounding = Rounding(exact=merged.element_size() > 2)  # float32 sums are exact enough for half precision
    deltas = torch.stack([_delta(weight, own, indices, rounding) for own in patches])
    return WeightSample(weight.reshape(-1)[indices].double(), merged.reshape(-1)[indices], deltas)


def _delta(weight: Tensor, patches: Sequence[Patch], indices: Tensor, rounding: Rounding) -> Tensor:
    """Return ΔW of one adapter at flat indices of the stored tensor, float64."""
    found, flat = torch.zeros(len(indices), dtype=torch.float64), weight.reshape(-1)

    def take(first: int, tile: Tensor) -> None:
        start, stop = (int(torch.searchsorted(indices, x)) for x in (first, first + len(tile)))
        here = indices[start:stop]
        found[start:stop] = tile[here - first] - flat[here].double()

    if patches:
        merge_tensor(weight, patches, take, out_dtype=torch.float64, rounding=rounding)
    return found


def found_strengths(numbers: WeightSample) -> Tensor:
    """Estimate the strengths, (n,): with rounding to nearest if it reproduces the values, else on average."""
    mean = nearest = numbers.along(numbers.change)
    for _ in range(STEPS):
        step = numbers.along(numbers.merged.double() - numbers.rounded_at(nearest))
        nearest = nearest + step
        if float(step.abs().max()) < 1e-6:
            break
    hit = (numbers.rounded_at(nearest) == numbers.merged.double()).double().mean()
    return nearest if float(hit) >= NEARLY_ALL else mean


def match_request(numbers: WeightSample, weights: Tensor) -> bool:
    """Return whether the change matches strengths `weights`, rounded to nearest or stochastically."""
    limit = NEAR * weights.abs().clamp_min(NEAR)
    to_nearest = numbers.along(numbers.merged.double() - numbers.rounded_at(weights)).abs() <= limit
    on_average = (numbers.along(numbers.change) - weights).abs() <= limit + SIGMAS * _spread(numbers, weights)
    return bool((to_nearest | on_average | ~numbers.present).all())


def _spread(numbers: WeightSample, weights: Tensor) -> Tensor:
    """Return the standard deviation of each strength due to stochastic rounding.

    A value at distance t from one grid point and u − t from the other has variance t·(u − t).
    """
    distance = (numbers.sum_at(weights) - numbers.rounded_at(weights)).abs()
    variance = distance * (numbers.unit - distance).clamp_min(0)
    return (numbers.deltas.square() @ variance).sqrt() / numbers.gram.diagonal().clamp_min(1e-300)


def as_floats(numbers: WeightSample, strengths: Tensor) -> tuple[float, ...]:
    """Return the strengths as floats, NaN for an adapter without a delta here."""
    return tuple(float(s) if there else nan for s, there in zip(strengths, numbers.present, strict=True))


def unexplained(numbers: WeightSample, strengths: Tensor) -> float:
    """Return ‖M − W − Σ s·ΔW‖ / ‖M − W‖; 0.0 if nothing changed."""
    whole = float(numbers.change.norm())
    return numbers.residual(strengths) / whole if whole else 0.0
