"""DoRA on a stored tensor, in two passes: norms first, then w·(W′ − W) tile by tile.

W′ = (W + D)·m/‖W + D‖ with D = Σ A ⊗ B (Liu et al., 2024), as in `krona_hub.adapters.adapter`. With f = m/‖W + D‖:

    w·(W′ − W) = w·f·D + w·(f − 1)·W

which is small where W is not, so that float32 suffices. f is one number per output row or per input channel.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from krona_hub.merging.arithmetic.patches import Addition


class Dora:
    """The scaling of one DoRA addition: `observe` every row, then `finish`, then `scale`."""

    def __init__(self, addition: Addition, columns: int, wide: torch.dtype) -> None:
        delta, place = addition.patch.delta, addition.patch.placement
        if delta.magnitude is None:
            raise TypeError("a delta without a magnitude")  # a bug of the caller
        self._weight, self._magnitude, self._wide = addition.patch.weight, delta.magnitude.double(), wide
        if place.swap_halves and place.transpose and delta.magnitude_axis == "out":
            self._magnitude = torch.cat(self._magnitude.chunk(2)[::-1])
        self._by_row = (delta.magnitude_axis == "out") != place.transpose
        self._kernel = 1 if self._by_row or delta.magnitude_axis == "out" else prod(delta.weight_shape[2:])
        self._squares = torch.zeros(len(self._magnitude) if self._by_row else columns, dtype=torch.float64)
        self._of_delta = self._of_base = torch.empty(0)

    def observe(self, directed: Tensor, first: int) -> None:
        """Accumulate the norms of rows first, first + 1, … of W + D."""
        squares = directed.double().square_()
        if self._by_row:
            self._squares[first : first + len(directed)] += squares.sum(1)
        else:
            self._squares += squares.sum(0)

    def finish(self) -> None:
        """Compute w·f and w·(f − 1) from the norms, per row or per column."""
        norm = self._squares.reshape(-1, self._kernel).sum(1).sqrt_()
        factor = torch.where(norm > 0, self._magnitude / norm, 0.0).repeat_interleave(self._kernel)
        self._of_delta = (self._weight * factor).to(self._wide)
        self._of_base = (self._weight * (factor - 1)).to(self._wide)

    def scale(self, delta: Tensor, base: Tensor, first: int) -> None:
        """Turn rows of D, in place, into those of w·(W′ − W)."""
        if self._by_row:
            rows = slice(first, first + len(delta))
            of_delta, of_base = self._of_delta[rows, None], self._of_base[rows, None]
        else:
            of_delta, of_base = self._of_delta[None], self._of_base[None]
        delta.mul_(of_delta).addcmul_(base, of_base)
