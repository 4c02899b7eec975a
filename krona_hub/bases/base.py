"""A base model as module names and weight shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from krona_hub.adapters.provenance import COMPONENTS, CONDITIONER, DENOISERS, BaseModel
from krona_hub.bases.component import Component
from krona_hub.bases.module_spec import ModuleSpec

__all__ = ["COMPONENTS", "CONDITIONER", "DENOISERS", "Base"]


@dataclass(frozen=True, eq=False)
class Base:
    """A base model: component -> module path -> ModuleSpec.

    Module paths are those of diffusers and transformers, without the `text_model.` of CLIP.
    """

    name: str  # catalog name, or the source path
    family: str | None  # name of the equal catalog entry; None without one
    components: Mapping[str, Component]  # component -> module path -> ModuleSpec; plain mappings are accepted
    hub_id: str | None = None  # e.g. "stabilityai/stable-diffusion-xl-base-1.0"
    uncovered: tuple[str, ...] = ()  # adaptable parts of the pipeline that `components` lacks, in words
    candidates: tuple[str, ...] = ()  # names of several equal catalog entries (sd21 and sd21-base)

    def __post_init__(self) -> None:
        components = {c: m if isinstance(m, Component) else Component(m) for c, m in self.components.items()}
        object.__setattr__(self, "components", MappingProxyType(components))

    def module(self, layer: str) -> ModuleSpec | None:
        """The module of a canonical layer name; None if the base has no such layer."""
        component, _, path = layer.partition(".")
        return self.components[component].get(path) if component in self.components else None

    def parameter(self, name: str) -> tuple[int, ...] | None:
        """The shape of a canonical parameter other than the weight of a layer; None if the base lacks it.

        These are biases, weights of norms and bare parameters.

        >>> from krona_hub.bases.module_spec import OtherParameters
        >>> norms = OtherParameters({"norm_q": ModuleSpec((64,), False)})
        >>> base = Base("x", None, {"transformer": Component({"to_q": ModuleSpec((128, 96))}, lambda: norms)})
        >>> base.parameter("transformer.to_q.bias"), base.parameter("transformer.norm_q.weight")
        ((128,), (64,))
        """
        component, _, path = name.partition(".")
        return self.components[component].parameter(path) if component in self.components else None

    @property
    def denoiser(self) -> str | None:
        """The denoiser component, `unet` or `transformer` for most models; None for a lone text encoder."""
        return next((c for c in DENOISERS if c in self.components), None)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The text-encoder components, in order."""
        return tuple(c for c in COMPONENTS if c in self.components and c.startswith("text_encoder"))

    def layers(self, component: str | None = None) -> Iterator[tuple[str, ModuleSpec]]:
        """Canonical name and module of every layer, of one component or of all components."""
        for owner in (component,) if component else self.components:
            for path, module in self.components[owner].items():
                yield f"{owner}.{path}", module

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the sorted lines `name shape` of the denoiser (of all components, for a base without a denoiser).

        Text encoders are excluded, so that folders with and without them count as the same base.
        """
        lines = sorted(f"{name} {'x'.join(map(str, m.shape))}\n" for name, m in self.layers(self.denoiser))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def model(self) -> BaseModel:
        """The record of this base model in an adapter."""
        fingerprint = self.fingerprint if self.denoiser else None  # a lone text encoder does not identify the model
        return BaseModel(self.family, self.hub_id, None, fingerprint, self.candidates)
