"""A base model as names and shapes, and where a module of a file lands in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from krona_hub.adapters.provenance import BaseModel
from krona_hub.bases.component import Component
from krona_hub.bases.module_spec import ModuleSpec

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
DENOISERS = COMPONENTS[:2]


@dataclass(frozen=True, eq=False)
class Base:
    """A base model: component -> module path -> ModuleSpec.

    Module paths are those of diffusers and transformers, CLIP's without `text_model.`.
    """

    name: str  # catalogue name, or the path or Hub id it was built from
    family: str | None  # catalogue name that it equals, None where it equals none
    components: Mapping[str, Component]  # component -> module path -> ModuleSpec; plain mappings are taken, too
    hub_id: str | None = None  # such as "stabilityai/stable-diffusion-xl-base-1.0"
    uncovered: tuple[str, ...] = ()  # parts of the pipeline that take adapters but are not listed, in words
    candidates: tuple[str, ...] = ()  # catalogue names that it equals, where they are several (sd21 and its base)

    def __post_init__(self) -> None:
        components = {c: m if isinstance(m, Component) else Component(m) for c, m in self.components.items()}
        object.__setattr__(self, "components", MappingProxyType(components))

    def module(self, layer: str) -> ModuleSpec | None:
        """The module of a canonical layer name, None where the base has none."""
        component, _, path = layer.partition(".")
        return self.components.get(component, Component()).get(path)

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
