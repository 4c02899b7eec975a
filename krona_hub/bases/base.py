"""A base model as names and shapes, and where a module of a file lands in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Module(NamedTuple):
    """One weight module of a base."""

    shape: tuple[int, ...]  # of the weight: (out, in) or (out, in / groups, k, …)
    bias: bool = True
    groups: int = 1


class Placement(NamedTuple):
    """A layer that a module of a file stands for, or stands for in part (a fused q|k|v)."""

    layer: str  # canonical name
    rows: tuple[int, int] | None = None  # rows of the file's module that belong to the layer; None: all
    swap_halves: bool = False  # the file stores the two halves of the rows the other way round
    transpose: bool = False  # the file stores the weight as (in, out)


@dataclass(frozen=True)
class Base:
    """A base model: component -> module path -> Module."""

    name: str  # catalogue name, or the path or Hub id it was built from
    family: str | None  # catalogue name that it equals, None where it equals none
    components: Mapping[str, Mapping[str, Module]]

    def module(self, layer: str) -> Module | None:
        """The module of a canonical layer name, None where the base has none."""
        component, _, path = layer.partition(".")
        return self.components.get(component, {}).get(path)
