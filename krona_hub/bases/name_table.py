"""One module, many names: from any dialect to canonical layers, and from a layer to a dialect. Torch-free.

Underscores cannot be undone by a rule (`to_q` or `to.q`?), so every name of a base is put into one table under its
underscored form and looked up (FORMATS §12.1); the table holds the diffusers and the original names together,
which never collide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache
from heapq import nlargest

from krona_hub.bases import dialects, ldm_names, name_prefixes
from krona_hub.bases.base import Base
from krona_hub.bases.component import Component
from krona_hub.bases.dialects import prefixed, processor_name, text_model, uses_originals
from krona_hub.bases.module_spec import Placement
from krona_hub.bases.name_rules import apply
from krona_hub.errors import AmbiguousError, InexpressibleError, NotFoundError

DIALECTS = tuple(dialects.DIALECTS)

LIKELY = 24  # layers that are compared letter by letter for "did you mean"
Placements = tuple[Placement, ...]
PROCESSOR_ERA = (  # how old diffusers wrote attention modules -> the module itself, tried in order
    (re.compile(r"^(.*_)processor_(to_[qkv])(?:_lora)?$"), r"\1\2"),
    (re.compile(r"^(.*?_)(?:processor_)?to_out(?:_lora)?$"), r"\1to_out_0"),
    (re.compile(r"^(.*_)processor_((?:add_[qkv]_proj|to_add_out))(?:_lora)?$"), r"\1\2"),
    (re.compile(r"^(.*self_attn_)to_([qkv]|out)(?:_lora)?$"), r"\1\2_proj"),
)


@dataclass(frozen=True, eq=False)
class ComponentNames:
    """The names of one component, indexed when they are first asked for."""

    component: str
    modules: Component

    @cached_property
    def originals(self) -> Mapping[str, Placements]:
        """The authors' own dotted name -> placements; {} where those are the diffusers names."""
        return {name: tuple(map(self._canonical, places)) for name, places in self._own_names.items()}

    @cached_property
    def _own_names(self) -> Mapping[str, Placements]:
        original = self.modules.original
        return apply(original.rules, self.modules) if original else ldm_names.names(self.modules)

    def _canonical(self, place: Placement) -> Placement:
        return place._replace(layer=f"{self.component}.{place.layer}")

    @cached_property
    def index(self) -> Mapping[str, str | Placements]:
        """Underscored name -> a path of this component, or the placements of an original name."""
        index: dict[str, str | Placements] = {underscored(name): places for name, places in self._own_names.items()}
        index.update((underscored(path), path) for path in self.modules)
        return index

    @cached_property
    def homes(self) -> Mapping[str, str]:
        """Canonical layer -> the authors' own dotted name of the module that holds it."""
        return {place.layer: name for name, places in self.originals.items() for place in places}

    def find(self, path: str) -> Placements | None:
        """Placements of a name without its prefix."""
        key = underscored(path)
        if self.component.startswith("text_encoder"):
            key = key.removeprefix("text_model_")
        found = self.index.get(key) or next((self.index[new] for new in _modern(key) if new in self.index), None)
        if isinstance(found, str):
            return (Placement(f"{self.component}.{found}"),)
        return found and tuple(map(self._canonical, found))


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
        found = {owner: places for owner, places in self.candidates(name) if component in (None, owner)}
        if len(found) > 1:
            raise AmbiguousError(f"{name} is a module of {' and of '.join(found)}.", fix="Choose one with --component.")
        return next(iter(found.values()), None)

    def candidates(self, name: str) -> list[tuple[str, Placements]]:
        """(component, placements), by the longest prefix under which the name is known at all."""
        for role, path in name_prefixes.readings(name):
            owners = name_prefixes.components(role, self.base)
            found = [(owner, p) for owner in owners if (p := self.parts[owner].find(path)) is not None]
            if found:
                return found
        return []

    @cached_property
    def parts(self) -> Mapping[str, ComponentNames]:
        return {c: ComponentNames(c, modules) for c, modules in self.base.components.items()}

    def spell(self, layer: str, dialect: str) -> str:
        """The name of a canonical layer in a dialect: that of the fused module where the dialect fuses.

        Raises NotFoundError for a layer that the base does not have, InexpressibleError where the dialect
        has no name for it, UsageError for an unknown dialect.

        >>> from krona_hub.bases import catalogue
        >>> names = table(catalogue.get("flux1-dev"))
        >>> names.spell("transformer.transformer_blocks.0.attn.to_q", "kohya-ldm")
        'lora_unet_double_blocks_0_img_attn_qkv'
        """
        if self.base.module(layer) is None:
            near = self.nearest(layer)
            fix = f"Did you mean {near!r}?" if near else "Choose the base that the adapter was made for."
            raise NotFoundError(f"{self.base.name} has no layer {layer!r}.", fix=fix)
        name = spell(self, layer, dialect)
        if name is None:
            raise InexpressibleError(
                f"{layer} has no name in the {dialect} dialect.", fix="Choose another format, or leave the layer out."
            )
        return name

    def fused(self, dialect: str) -> Mapping[str, Placements]:
        """Names of a dialect that are no plain layer: several layers stacked, halves swapped, or a transpose."""
        return {
            dialects.prefixed(self.base, part.component, name, dialect): places
            for part in self.parts.values()
            if dialects.uses_originals(self.base, part.component, dialect)
            for name, places in part.originals.items()
            if not (len(places) == 1 and places[0].plain)
        }

    def nearest(self, name: str) -> str | None:
        """The canonical layer whose name looks most like an unknown one, for "did you mean"; None if none does."""
        key = underscored(name_prefixes.readings(name)[0][1])
        words = set(key.split("_"))
        likely = nlargest(LIKELY, self._words, key=lambda layer: len(self._words[layer] & words))
        flat = {underscored(layer): layer for layer in likely}
        near = get_close_matches(key, flat, n=1, cutoff=0.5)
        return flat[near[0]] if near else None

    @cached_property
    def _words(self) -> Mapping[str, frozenset[str]]:
        """Canonical layer -> the words of its name; comparing letters with a thousand names would take too long."""
        return {layer: frozenset(underscored(layer).split("_")) for layer, _ in self.base.layers()}


@lru_cache(maxsize=64)
def table(base: Base) -> NameTable:
    """The name table of a base, built once."""
    return NameTable(base)


def underscored(path: str) -> str:
    return path.replace(".", "_")


def _modern(key: str) -> Iterable[str]:
    """The names of today for a name of the processor era."""
    if not ("processor" in key or "self_attn_to_" in key or key.endswith("to_out")):
        return ()
    return (pattern.sub(new, key) for pattern, new in PROCESSOR_ERA if pattern.match(key))


def spell(table: NameTable, layer: str, dialect: str) -> str | None:
    """The name of a layer that the base has; None where the dialect has none."""
    component, _, path = layer.partition(".")
    if dialect == "processor":
        return processor_name(component, text_model(table.base, component, path, dialect))
    if uses_originals(table.base, component, dialect):
        path = table.parts[component].homes.get(layer, path)
    return prefixed(table.base, component, path, dialect)
