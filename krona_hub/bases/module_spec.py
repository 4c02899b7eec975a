"""A weight module of a base model, and the placement of a stored module in it."""

from __future__ import annotations

from math import prod
from typing import NamedTuple


class ModuleSpec(NamedTuple):
    """A weight module of a base model."""

    shape: tuple[int, ...]  # shape of the weight: (out, in) or (out, in / groups, k, …)
    bias: bool = True
    groups: int = 1

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in·k…): the weight flattened from dimension 1."""
        return self.shape[0], prod(self.shape[1:])

    @property
    def has_kernel(self) -> bool:
        """Whether the module is a convolution with a kernel larger than 1×1."""
        return prod(self.shape[2:]) > 1


class Placement(NamedTuple):
    """The layer that a stored module represents, entirely or in part (a fused q|k|v)."""

    layer: str  # canonical name
    rows: tuple[int, int] | None = None  # rows of the stored module that belong to the layer; None: all
    swap_halves: bool = False  # the file stores the two halves of the rows swapped
    transpose: bool = False  # the file stores the weight as (in, out)

    @property
    def plain(self) -> bool:
        """Whether the stored module is the layer itself, possibly with another name."""
        return self.rows is None and not self.swap_halves and not self.transpose
