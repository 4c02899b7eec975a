"""A weight module of a base model, and the placement of a stored module in it."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
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


class OtherParameters(NamedTuple):
    """The parameters of a model that belong to no layer and to no embedding."""

    norms: Mapping[str, ModuleSpec] = MappingProxyType({})  # module path -> its weight, and whether it has a bias
    bare: Mapping[str, ModuleSpec] = MappingProxyType({})  # full path of any other parameter -> its shape


def other_parameters(shapes: Mapping[str, tuple[int, ...]]) -> OtherParameters:
    """Sort the parameters that belong to no layer and to no embedding: a norm has a weight of one dimension.

    >>> norms, bare = other_parameters({"norm.weight": (8,), "norm.bias": (8,), "block.table": (6, 8)})
    >>> norms["norm"], bare["block.table"].shape
    (ModuleSpec(shape=(8,), bias=True, groups=1), (6, 8))
    """
    norms = {
        path.removesuffix(".weight"): ModuleSpec(shape, f"{path.removesuffix('.weight')}.bias" in shapes)
        for path, shape in shapes.items()
        if path.endswith(".weight") and len(shape) == 1
    }
    rest = {p: s for p, s in shapes.items() if not (p.endswith((".weight", ".bias")) and p.rpartition(".")[0] in norms)}
    return OtherParameters(norms, {path: ModuleSpec(shape, False) for path, shape in rest.items()})


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
