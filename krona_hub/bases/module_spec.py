"""One weight module of a base model, and where a module of a file lands in it."""

from __future__ import annotations

from math import prod
from typing import NamedTuple


class ModuleSpec(NamedTuple):
    """One weight module of a base."""

    shape: tuple[int, ...]  # of the weight: (out, in) or (out, in / groups, k, …)
    bias: bool = True
    groups: int = 1

    @property
    def matrix(self) -> tuple[int, int]:
        """(out, in·k…): the weight flattened from dimension 1."""
        return self.shape[0], prod(self.shape[1:])

    @property
    def has_kernel(self) -> bool:
        """Whether it is a convolution wider than 1×1."""
        return prod(self.shape[2:]) > 1


class Placement(NamedTuple):
    """A layer that a module of a file stands for, or stands for in part (a fused q|k|v)."""

    layer: str  # canonical name
    rows: tuple[int, int] | None = None  # rows of the file's module that belong to the layer; None: all
    swap_halves: bool = False  # the file stores the two halves of the rows the other way round
    transpose: bool = False  # the file stores the weight as (in, out)

    @property
    def plain(self) -> bool:
        """Whether the file's module is the layer itself, under another name."""
        return self.rows is None and not self.swap_halves and not self.transpose
