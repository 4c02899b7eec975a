"""Round sums in float32 or float64 to the dtype of a file, once, and measure the loss."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from math import floor, log2, sqrt
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from krona_hub.merging.arithmetic.scratch import scratch


@dataclass(frozen=True)
class Rounding:
    """How a merged tensor is rounded to its stored dtype."""

    mode: Literal["nearest", "stochastic"] = "nearest"
    seed: int = 0  # for stochastic rounding, combined with the name of the tensor
    exact: bool = False  # sums in float64: every number is correctly rounded


NEAREST = Rounding()


class Survival(NamedTuple):
    """What survives rounding of a delta, as sums of squares, which add up over tensors with `+`.

    >>> total = Survival(9.0, 1.0) + Survival(7.0, 3.0)
    >>> total, total.share
    (Survival(wanted=16.0, lost=4.0), 0.5)
    """

    wanted: float = 0.0  # ‖w·ΔW‖² over all patches of the tensor together
    lost: float = 0.0  # ‖(W′ − W) − w·ΔW‖² over the rows that patches touch

    def __add__(self, other: object) -> Survival:
        if not isinstance(other, Survival):
            return NotImplemented
        return Survival(self.wanted + other.wanted, self.lost + other.lost)

    @property
    def share(self) -> float:
        """Relative error of the change, ‖lost‖ / ‖wanted‖: 0 if nothing is lost; at 0.7, most is."""
        return sqrt(self.lost / self.wanted) if self.wanted else 0.0


Rounder = Callable[[Tensor, Tensor], None]  # (sums, output of the stored dtype)

WIDE = (torch.float32, torch.float64)  # dtypes of the sums
SATURATED = (torch.float8_e4m3fn,)  # without Inf: some versions of torch cast overflowing values to the largest number


def rounder(rounding: Rounding, wide: torch.dtype, out: torch.dtype, name: str) -> Rounder:
    """Return the function that rounds sums in `wide` to `out`; one per tensor: its random stream is sequential."""
    if out in WIDE:
        return _cast
    narrowing = _cast_double if wide == torch.float64 else _cast
    if rounding.mode == "stochastic":
        narrowing = _Stochastic(wide, out, rounding.seed, name)
    return _Unsaturated(narrowing, out) if out in SATURATED else narrowing


def _cast(sums: Tensor, out: Tensor) -> None:
    out.copy_(sums)


def _cast_double(sums: Tensor, out: Tensor) -> None:
    """Round once; torch casts float64 to a narrow dtype through float32, which rounds twice."""
    out.copy_(_to_odd(sums))


def _to_odd(sums: Tensor) -> Tensor:
    """Round float64 to float32 to odd (set the last bit of inexact values), so that rounding again is correct.

    Boldo & Melquiond, "Emulation of FMA and correctly rounded sums" (2008); needs two bits more than the final dtype.
    """
    near = scratch("near", sums.numel(), torch.float32).copy_(sums)
    error = scratch("error", sums.numel(), torch.float64).copy_(near).sub_(sums)
    inexact = error.ne(0)
    bits = near.view(torch.int32)
    bits -= error.mul_(sums).gt(0).view(torch.int8)  # undo rounding away from zero
    bits |= inexact.view(torch.int8)
    return near


def _overflow(out: torch.dtype) -> float:
    """Return the smallest number that rounds to Inf: half a step above the largest."""
    info = torch.finfo(out)
    return info.max + info.eps / 2 * 2.0 ** floor(log2(info.max))


class _Unsaturated:
    """Turn overflowing values into NaN, for a dtype without Inf."""

    def __init__(self, narrowing: Rounder, out: torch.dtype) -> None:
        self._narrowing, self._overflow = narrowing, _overflow(out)

    def __call__(self, sums: Tensor, out: Tensor) -> None:
        self._narrowing(sums, out)
        too_large = sums.abs() > self._overflow
        if bool(too_large.any()):
            out.copy_(torch.where(too_large, torch.nan, out.float()))


class _Stochastic:
    """Round up or down at random, so that the mean is the sum: add random bits below the last bit kept.

    The bits come from SFC64, whose stream numpy keeps stable, seeded by the seed and the name of the tensor: equal in
    any thread and any order. torch takes five times as long to generate them.
    """

    def __init__(self, wide: torch.dtype, out: torch.dtype, seed: int, name: str) -> None:
        info = torch.finfo(out)
        self._int = torch.int32 if wide == torch.float32 else torch.int64
        self._dropped = round(log2(info.eps / torch.finfo(wide).eps))  # bits
        self._random_dtype = next(
            size for size in (np.int16, np.int32, np.int64) if np.iinfo(size).bits >= self._dropped
        )
        self._smallest, self._quantum = info.smallest_normal, info.smallest_normal * info.eps
        self._largest, self._overflow = info.max, _overflow(out)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        self._random = np.random.SFC64(int.from_bytes(digest[:16], "little"))

    def __call__(self, sums: Tensor, out: Tensor) -> None:
        random_bits = self._random_integers(sums.numel())
        bits = scratch("bits", sums.numel(), self._int).copy_(random_bits).bitwise_and_((1 << self._dropped) - 1)
        kept = bits.add_(sums.view(self._int)).bitwise_and_(-1 << self._dropped).view(sums.dtype)
        sizes = torch.abs(sums, out=scratch("sizes", sums.numel(), sums.dtype))
        small = sizes.lt(self._smallest).nonzero().flatten()
        if len(small):
            kept[small] = self._subnormal(sums[small], random_bits[small])
        if not bool(sizes.amax() < self._largest):
            bounded = kept.clamp_(-self._largest, self._largest)
            kept = torch.where(sizes < self._overflow, bounded, sums)  # Inf and NaN stay
        out.copy_(kept)

    def _random_integers(self, numel: int) -> Tensor:
        """Return uniform random integers with at least as many bits as are dropped."""
        size = np.dtype(self._random_dtype).itemsize
        words: NDArray[np.uint64] = self._random.random_raw(-(-numel * size // 8))
        return torch.from_numpy(words.view(self._random_dtype)[:numel])

    def _subnormal(self, sums: Tensor, random_bits: Tensor) -> Tensor:
        """Round subnormal numbers, whose steps have a constant size."""
        step = 1 << self._dropped
        shares = random_bits.to(self._int).bitwise_and_(step - 1).to(sums.dtype) / step
        return torch.copysign((sums / self._quantum + shares).floor_() * self._quantum, sums)
