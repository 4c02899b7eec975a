"""One module, many names: from any dialect to canonical layers, and from a layer to a dialect. Torch-free.

Underscores cannot be undone by a rule (`to_q` or `to.q`?), so every name of a base is put into one table under its
underscored form and looked up (FORMATS §12.1); the table holds the diffusers and the original names together,
which never collide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache

from krona_hub.bases import ldm, prefixes, spelling
from krona_hub.bases.base import Base, Module, Placement
from krona_hub.bases.originals import original_of
from krona_hub.bases.rules import apply
from krona_hub.errors import AmbiguousError, InexpressibleError, NotFoundError

DIALECTS = spelling.DIALECTS

Placements = tuple[Placement, ...]
PROCESSOR_ERA = (  # how old diffusers wrote attention modules -> the module itself, tried in order
    (re.compile(r"^(.*_)processor_(to_[qkv])(?:_lora)?$"), r"\1\2"),
    (re.compile(r"^(.*?_)(?:processor_)?to_out(?:_lora)?$"), r"\1to_out_0"),
    (re.compile(r"^(.*_)processor_((?:add_[qkv]_proj|to_add_out))(?:_lora)?$"), r"\1\2"),
    (re.compile(r"^(.*self_attn_)to_([qkv]|out)(?:_lora)?$"), r"\1\2_proj"),
)


@dataclass(frozen=True, eq=False)
class NameTable:
    """Every name that the modules of `base` go by. Built in milliseconds; `table(base)` keeps one per base."""

    base: Base

    def find(self, name: str, component: str | None = None) -> Placements | None:
        """Where a module of a file lands, None where the base has no such module.

        `name` is the module's name in any dialect, without the parameter (`.lora_down.weight`, …). A fused module has
        several placements, with the rows of each. Raises AmbiguousError where a name without a component fits several
        components and `component` does not choose one.

        >>> from krona_hub.bases import catalogue
        >>> names = table(catalogue.get("sdxl"))
        >>> names.find("lora_unet_input_blocks_4_1_proj_in")[0].layer
        'unet.down_blocks.1.attentions.0.proj_in'
        """
        found = {owner: places for owner, places in self._candidates(name) if component in (None, owner)}
        if len(found) > 1:
            raise AmbiguousError(f"{name} is a module of {' and of '.join(found)}.", fix="Choose one with --component.")
        return next(iter(found.values()), None)

    def components_of(self, name: str) -> tuple[str, ...]:
        """The components that have a module of this name; more than one where the name does not say."""
        return tuple(owner for owner, _ in self._candidates(name))

    def _candidates(self, name: str) -> Iterator[tuple[str, Placements]]:
        """Component -> placements, by the longest prefix under which the name is known at all."""
        for prefix in prefixes.DOTTED if "." in name else prefixes.UNDERSCORED:
            if name.startswith(prefix.text):
                path = name[len(prefix.text) :]
                owners = prefixes.components(prefix.role, self.base)
                found = [(owner, p) for owner in owners if (p := self._in_component(owner, path)) is not None]
                if found:
                    yield from found
                    return

    def _in_component(self, component: str, path: str) -> Placements | None:
        index, key = self._index[component], underscored(path)
        if component.startswith("text_encoder"):
            key = key.removeprefix("text_model_")
        if key in index:
            return index[key]
        return next((index[old] for old in _modern(key) if old in index), None)

    @cached_property
    def _index(self) -> Mapping[str, Mapping[str, Placements]]:
        """component -> underscored name -> placements."""
        return {c: self._component_index(c, modules) for c, modules in self.base.components.items()}

    def _component_index(self, component: str, modules: Mapping[str, Module]) -> dict[str, Placements]:
        index: dict[str, Placements] = {underscored(path): (Placement(f"{component}.{path}"),) for path in modules}
        for name, places in self.originals[component].items():
            index.setdefault(underscored(name), places)
        return index

    @cached_property
    def originals(self) -> Mapping[str, Mapping[str, Placements]]:
        """component -> the authors' own dotted name -> placements; {} where those are the diffusers names."""
        return {c: _original_names(c, modules) for c, modules in self.base.components.items()}

    def spell(self, layer: str, dialect: str) -> str:
        """The name of a canonical layer in a dialect: that of the fused module where the dialect fuses.

        Raises NotFoundError for a layer that the base does not have, InexpressibleError where the dialect
        has no name for it, UsageError for an unknown dialect.
        """
        if self.base.module(layer) is None:
            near = self.nearest(layer)
            raise NotFoundError(
                f"{self.base.name} has no layer {layer!r}.", fix=f"Did you mean {near!r}?" if near else ""
            )
        name = spelling.spell(self, layer, dialect)
        if name is None:
            raise InexpressibleError(
                f"{layer} has no name in the {dialect} dialect.", fix="Choose another format, or leave the layer out."
            )
        return name

    def fused(self, dialect: str) -> Mapping[str, Placements]:
        """Names of a dialect that are no plain layer: several layers stacked, halves swapped, or a transpose."""
        return {
            spelling.prefixed(self, c, name, dialect): places
            for c, names in self.originals.items()
            if spelling.uses_originals(self, c, dialect)
            for name, places in names.items()
            if not (len(places) == 1 and places[0].plain)
        }

    @cached_property
    def home(self) -> Mapping[str, str]:
        """Canonical layer -> the authors' own dotted name of the module that holds it."""
        return {place.layer: name for names in self.originals.values() for name, ps in names.items() for place in ps}

    def nearest(self, name: str) -> str | None:
        """The canonical layer whose name looks most like an unknown one, for "did you mean"."""
        flat = {underscored(layer): layer for layer, _ in self.base.layers()}
        near = get_close_matches(underscored(_bare(name)), flat, n=1, cutoff=0.5)
        return flat[near[0]] if near else None


@lru_cache(maxsize=64)
def table(base: Base) -> NameTable:
    """The name table of a base, built once."""
    return NameTable(base)


def underscored(path: str) -> str:
    return path.replace(".", "_")


def _modern(key: str) -> Iterable[str]:
    return (pattern.sub(new, key) for pattern, new in PROCESSOR_ERA if pattern.match(key))


def _original_names(component: str, modules: Mapping[str, Module]) -> dict[str, Placements]:
    original = original_of(modules)
    names = apply(original.rules, modules) if original else ldm.names(modules)
    return {
        name: tuple(place._replace(layer=f"{component}.{place.layer}") for place in places)
        for name, places in names.items()
    }


def _bare(name: str) -> str:
    """The name without the longest prefix it has."""
    known = prefixes.DOTTED if "." in name else prefixes.UNDERSCORED
    return name[max(len(p.text) for p in known if name.startswith(p.text)) :]
