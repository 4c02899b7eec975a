"""A weight module of a base model, and the placement of a stored module in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """The layer that a stored module represents: all or a part of the module is all or a part of the layer."""

    layer: str  # canonical name
    rows: tuple[int, int] | None = None  # rows of the stored module that belong to the layer; None: all
    swap_halves: bool = False  # the file stores the two halves of the rows swapped
    transpose: bool = False  # the file stores the weight as (in, out)
    part: tuple[int, int] | None = None  # rows of the layer that the stored module fills; None: all
    shared_with: tuple[str, ...] = ()  # other layers that the same rows of the stored module represent

    @property
    def plain(self) -> bool:
        """Whether the stored module is the layer itself, possibly with another name."""
        return self.rows is None and not self.swap_halves and not self.transpose and self.part is None

    def renamed(self, ending: str) -> Placement:
        """The same placement of a parameter of the layer, `.bias` or `.weight`, in a parameter of the module."""
        return self._replace(layer=self.layer + ending, shared_with=tuple(layer + ending for layer in self.shared_with))

    def height(self, module: ModuleSpec) -> int:
        """Number of rows of its layer, `module`, that the stored module fills."""
        return self.part[1] - self.part[0] if self.part else module.shape[0]

    def overlaps(self, other: Placement) -> bool:
        """Whether both fill the same rows of the same layer.

        >>> up, gate = Placement("x", part=(0, 4)), Placement("x", part=(4, 8))
        >>> up.overlaps(gate), up.overlaps(Placement("x")), up.overlaps(Placement("y"))
        (False, True, False)
        """
        if self.layer != other.layer or self.part is None or other.part is None:
            return self.layer == other.layer
        return self.part[0] < other.part[1] and other.part[0] < self.part[1]


def stored_height(placements: Sequence[Placement], heights: Sequence[int]) -> int:
    """Rows of the stored module of these placements, before a transposition; `heights` are those of `Placement.height`.

    >>> stored_height([Placement("q", (0, 4)), Placement("k", (4, 6))], [4, 2])
    6
    >>> stored_height([Placement("a", shared_with=("b",)), Placement("b", shared_with=("a",))], [4, 4])
    4
    """
    return sum(heights) if placements[0].rows else heights[0]
