"""Compare stored values: bit for bit, and by distance in units in the last place (ULP)."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

INTEGERS = {
    1: torch.int8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # bytes per value -> integer dtype of its bits
FAR = 1 << 62  # units, if only one of two values is finite, or only one is NaN


@dataclass
class Apart:
    """Distance of values from the expected ones, accumulated over tiles."""

    elements: int = 0
    unequal: int = 0  # different bits
    worst: float = 0  # ULP; inf if only one of the two is finite

    def add(self, wanted: Tensor, found: Tensor) -> None:
        """Compare two tensors of one dtype and size."""
        bits = INTEGERS[wanted.element_size()]
        unlike = wanted.view(bits) != found.view(bits)
        self.elements += wanted.numel()
        count = int(unlike.sum())
        if count:
            self.unequal += count
            far = int(units_apart(wanted[unlike], found[unlike]).max())
            self.worst = max(self.worst, inf if far >= FAR else far)


def units_apart(a: Tensor, b: Tensor) -> Tensor:
    """Return the distance of each pair in representable numbers, int64; FAR if only one is finite.

    >>> a = torch.tensor([1.0, 1.0, 0.0, 60000.0], dtype=torch.float16)
    >>> b = torch.tensor([1.0, 1.0 + 2**-10, -0.0, float("inf")], dtype=torch.float16)
    >>> units_apart(a, b).tolist() == [0, 1, 0, FAR]
    True
    """
    apart = (_rank(a) - _rank(b)).abs()
    wide_a, wide_b = a.double(), b.double()
    apart[wide_a.isfinite() != wide_b.isfinite()] = FAR
    apart[(wide_a.sign() * wide_b.sign() < 0) & (apart < 0)] = (
        FAR  # float64 of opposite signs: the difference overflows
    )
    apart[wide_a.isnan() & wide_b.isnan()] = 0
    return apart


def _rank(values: Tensor) -> Tensor:
    """Return the rank of each value among all representable ones, 0 for both zeros."""
    width = values.element_size()
    bits: Tensor = values.view(INTEGERS[width]).long()
    return torch.where(bits < 0, -(1 << (8 * width - 1)) - bits, bits)


def unit(values: Tensor) -> Tensor:
    """Return the distance from each value to the next larger one in magnitude, float64."""
    facts = torch.finfo(values.dtype)
    wide = values.double().abs().clamp_min(facts.smallest_normal)
    return torch.ldexp(torch.full_like(wide, facts.eps), torch.frexp(wide).exponent - 1)
