"""A base model as names and shapes, and where a module of a file lands in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

from krona_hub.adapters.provenance import BaseModel

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
DENOISERS = COMPONENTS[:2]


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


@dataclass(frozen=True, eq=False)
class Base:
    """A base model: component -> module path -> Module.

    Module paths are those of diffusers and transformers, CLIP's without `text_model.`.
    """

    name: str  # catalogue name, or the path or Hub id it was built from
    family: str | None  # catalogue name that it equals, None where it equals none
    components: Mapping[str, Mapping[str, ModuleSpec]]
    hub_id: str | None = None  # such as "stabilityai/stable-diffusion-xl-base-1.0"
    uncovered: tuple[str, ...] = ()  # parts of the pipeline that take adapters but are not listed, in words
    candidates: tuple[str, ...] = ()  # catalogue names that it equals, where they are several (sd21 and its base)

    def module(self, layer: str) -> ModuleSpec | None:
        """The module of a canonical layer name, None where the base has none."""
        component, _, path = layer.partition(".")
        return self.components.get(component, {}).get(path)

    @property
    def denoiser(self) -> str | None:
        """The component that denoises, `unet` or `transformer`; None for a lone text encoder."""
        return next((c for c in DENOISERS if c in self.components), None)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return tuple(c for c in COMPONENTS if c in self.components and c not in DENOISERS)

    def layers(self, component: str | None = None) -> Iterator[tuple[str, ModuleSpec]]:
        """Canonical name and module of every layer, of one component or of all."""
        for owner in (component,) if component else self.components:
            for path, module in self.components[owner].items():
                yield f"{owner}.{path}", module

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the sorted lines `name shape` of the denoiser (of everything, where there is none).

        Text encoders stay out, so that a folder with and one without them is the same base.
        """
        lines = sorted(f"{name} {'x'.join(map(str, m.shape))}\n" for name, m in self.layers(self.denoiser))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def model(self) -> BaseModel:
        """What an adapter remembers of its base."""
        told = self.fingerprint if self.denoiser else None  # a lone text encoder says little of the model it is for
        return BaseModel(self.family, self.hub_id, None, told, self.candidates)
