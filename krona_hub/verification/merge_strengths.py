"""At which strengths were adapters merged into a tensor? By least squares over a sample of its numbers.

    M − W ≈ Σᵢ sᵢ·ΔWᵢ     M: merged   W: base   sᵢ: what is looked for

Rounding to nearest is no noise here: W lies on the grid of its type, and a delta below half a unit is lost as a whole.
So the strengths are those s for which round(W + Σ s·ΔW) lies along the deltas where M does; after stochastic rounding,
whose mean is the true sum, they are those of the sum itself.
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

MOST = 1 << 18  # numbers of a tensor that are looked at: enough for three digits of a strength, and bounded memory
STEPS = 30  # of the search for s; each brings it several times nearer
NEAR = 0.01  # relative; strengths this close to what was asked are those that were asked
SIGMAS = 5  # beyond which stochastic rounding does not explain another strength
NEARLY_ALL = 0.99  # share of numbers that rounding to nearest must hit to be what was done


@dataclass(frozen=True, eq=False)
class WeightSample:
    """Some numbers of a tensor: of the base, of the merged one, and of each adapter's delta at strength 1."""

    base: Tensor  # (m,), float64
    merged: Tensor  # (m,), in the type that it is stored in
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
        """W + Σ s·ΔW, (m,)."""
        return self.base + strengths @ self.deltas

    def rounded_at(self, strengths: Tensor) -> Tensor:
        """round(W + Σ s·ΔW), to nearest, in float64, (m,)."""
        return self.sum_at(strengths).to(self.merged.dtype).double()

    def along(self, change: Tensor) -> Tensor:
        """The strengths whose sum lies nearest to a change, (n,)."""
        found: Tensor = torch.linalg.lstsq(self.gram, (self.deltas @ change)[:, None], driver="gelsd").solution
        return found[:, 0]

    def residual(self, strengths: Tensor) -> float:
        """‖M − W − Σ s·ΔW‖."""
        return float((self.merged.double() - self.sum_at(strengths)).norm())

    def explains(self, strengths: Tensor) -> bool:
        """Whether rounding by one unit at most per number may have left that residual."""
        return self.residual(strengths) <= float(self.unit.norm())


def sample(weight: Tensor, merged: Tensor, patches: Sequence[Sequence[Patch]]) -> WeightSample:
    """A sample of a stored tensor, of finite numbers; `patches[i]` are those of adapter i, at strength 1."""
    places = torch.arange(0, weight.numel(), -(-weight.numel() // MOST))
    sound = weight.reshape(-1)[places].double().isfinite() & merged.reshape(-1)[places].double().isfinite()
    places = places[sound]
    rounding = Rounding(exact=merged.element_size() > 2)  # float32 sums are exact enough for half precision
    deltas = torch.stack([_delta(weight, own, places, rounding) for own in patches])
    return WeightSample(weight.reshape(-1)[places].double(), merged.reshape(-1)[places], deltas)


def _delta(weight: Tensor, patches: Sequence[Patch], places: Tensor, rounding: Rounding) -> Tensor:
    """ΔW of one adapter at some places of the stored tensor, float64."""
    found, flat = torch.zeros(len(places), dtype=torch.float64), weight.reshape(-1)

    def take(first: int, tile: Tensor) -> None:
        start, stop = (int(torch.searchsorted(places, x)) for x in (first, first + len(tile)))
        here = places[start:stop]
        found[start:stop] = tile[here - first] - flat[here].double()

    if patches:
        merge_tensor(weight, patches, take, out_dtype=torch.float64, rounding=rounding)
    return found


def found_strengths(numbers: WeightSample) -> Tensor:
    """The strengths that explain the change best, (n,): by rounding to nearest where that hits, else on average."""
    mean = nearest = numbers.along(numbers.change)
    for _ in range(STEPS):
        step = numbers.along(numbers.merged.double() - numbers.rounded_at(nearest))
        nearest = nearest + step
        if float(step.abs().max()) < 1e-6:
            break
    hit = (numbers.rounded_at(nearest) == numbers.merged.double()).double().mean()
    return nearest if float(hit) >= NEARLY_ALL else mean


def as_asked(numbers: WeightSample, weights: Tensor) -> bool:
    """Whether the change is that of adapters at `weights`, rounded to nearest or stochastically."""
    limit = NEAR * weights.abs().clamp_min(NEAR)
    by_nearest = numbers.along(numbers.merged.double() - numbers.rounded_at(weights)).abs() <= limit
    on_average = (numbers.along(numbers.change) - weights).abs() <= limit + SIGMAS * _spread(numbers, weights)
    return bool((by_nearest | on_average | ~numbers.present).all())


def _spread(numbers: WeightSample, weights: Tensor) -> Tensor:
    """The standard deviation that stochastic rounding gives to each strength.

    A number at distance t from the grid and u − t from its other neighbour has the variance t·(u − t).
    """
    distance = (numbers.sum_at(weights) - numbers.rounded_at(weights)).abs()
    variance = distance * (numbers.unit - distance).clamp_min(0)
    return (numbers.deltas.square() @ variance).sqrt() / numbers.gram.diagonal().clamp_min(1e-300)


def in_words(numbers: WeightSample, strengths: Tensor) -> tuple[float, ...]:
    """The strengths as plain numbers; NaN for an adapter without a delta here."""
    return tuple(float(s) if there else nan for s, there in zip(strengths, numbers.present, strict=True))


def unexplained(numbers: WeightSample, strengths: Tensor) -> float:
    """‖M − W − Σ s·ΔW‖ / ‖M − W‖; 0.0 where nothing changed."""
    whole = float(numbers.change.norm())
    return numbers.residual(strengths) / whole if whole else 0.0
