"""From the sum, in float32 or float64, to the numbers of a file: once, and with what that loses measured."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Literal, NamedTuple


@dataclass(frozen=True)
class Rounding:
    """How a merged tensor is rounded to the type that it is stored in."""

    mode: Literal["nearest", "stochastic"] = "nearest"
    seed: int = 0  # of stochastic rounding, together with the name of the tensor
    exact: bool = False  # sums in float64: every number is the true one, rounded once


NEAREST = Rounding()


class Survival(NamedTuple):
    """What rounding left of a delta, as sums of squares: those of several tensors add up with `+`.

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
        """The relative error of what was added, ‖lost‖ / ‖wanted‖: 0 all of it is there, 0.7 most is lost."""
        return sqrt(self.lost / self.wanted) if self.wanted else 0.0
