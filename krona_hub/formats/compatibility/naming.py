"""Namings: the prefixes and spellings in which applications find the modules of a base model. Torch-free.

A naming is written `PREFIX SPELLING`, as in the tables of `applications/`. After a prefix that ends in `_`, dots become
underscores.

| spelling | module path |
|---|---|
| diffusers | that of the diffusers class; of a CLIP with `text_model.`, as in its checkpoint |
| authors, comfyui, … | that of the released checkpoint, of ComfyUI, … (`bases.original_names`) |
| own | `comfyui`, else `authors`, else `diffusers`: that of ComfyUI's model |
| processor | as diffusers, but `attn1.processor.to_q` and `attn1.processor.to_out` for attention |
| inner | of a text encoder without `model.` or `text_model.` |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property
from typing import NamedTuple

from krona_hub.bases.base import CONDITIONER, DENOISERS, Base
from krona_hub.bases.module_spec import Placement
from krona_hub.bases.name_table import ComponentNames, table, underscored
from krona_hub.bases.original_names import AUTHORS, COMFYUI

Placements = tuple[Placement, ...]
OWN = "own"
PARTIAL = ("qkv", "xlabs")  # tables of a few modules; other layers have no name in these spellings


class Naming(NamedTuple):
    """A prefix and a spelling of module paths."""

    prefix: str
    spelling: str

    def __str__(self) -> str:
        return f"{self.prefix} {self.spelling}"

    @property
    def is_flat(self) -> bool:
        """Whether dots become underscores."""
        return self.prefix.endswith("_")


def naming(text: str) -> Naming:
    """The naming that a text denotes.

    >>> naming("lora_unet_ authors"), naming(" diffusers")
    (Naming(prefix='lora_unet_', spelling='authors'), Naming(prefix='', spelling='diffusers'))
    """
    prefix, _, spelling = text.rpartition(" ")
    return Naming(prefix, spelling)


@cache
def pattern(text: str) -> re.Pattern[str]:
    """A pattern of layer paths as a regular expression: `#` is a number, `*` any text.

    >>> bool(pattern("layers.#.attn.*").fullmatch("layers.12.attn.to_q"))
    True
    """
    return re.compile(re.escape(text).replace(r"\#", "[0-9]+").replace(r"\*", ".*"))


class ComponentNamings:
    """The namings of one component that an application finds, the one to write first."""

    def __init__(self, namings: Iterable[str], missing: Mapping[str, Iterable[str]]) -> None:
        self.namings = tuple(map(naming, namings))
        self.missing = {n: tuple(missing[str(n)]) for n in self.namings if str(n) in missing}

    def lacks(self, known: Naming, path: str) -> bool:
        """Whether the application does not find this layer in this naming, although it finds others."""
        return any(pattern(text).fullmatch(path) for text in self.missing.get(known, ()))


class Speller:
    """The names of the layers of one component of a base model in every naming."""

    def __init__(self, base: Base, component: str) -> None:
        self.base, self.component = base, component
        self.part: ComponentNames = table(base).parts[component]

    def spelling(self, known: Naming) -> str | None:
        """The table of names that a naming refers to; None for the diffusers names."""
        if known.spelling == OWN:
            return next((s for s in (COMFYUI, AUTHORS) if s in self.part.spellings), None)
        return known.spelling if known.spelling in self.part.spellings else None

    def modules(self, known: Naming) -> Mapping[str, Placements]:
        """Full name -> placements of the modules that a table of names lists; {} for the diffusers names."""
        spelling = self.spelling(known)
        return self._listed(known, spelling) if spelling else {}

    def _listed(self, known: Naming, spelling: str) -> Mapping[str, Placements]:
        cached = self._tables.get(known)
        if cached is None:
            names = self.part.spellings[spelling].items()
            cached = {self._prefixed(known, name): places for name, places in names}
            self._tables[known] = cached
        return cached

    @cached_property
    def _tables(self) -> dict[Naming, Mapping[str, Placements]]:
        return {}

    def homes(self, known: Naming, layer: str) -> tuple[tuple[str, Placement, Placements], ...]:
        """The modules that store a layer: (full name, placement, all placements of the module)."""
        listed = self._parted(known).get(layer)
        if listed is not None:
            return listed
        place = Placement(layer)
        return ((self.name(known, layer.partition(".")[2]), place, (place,)),)

    def _parted(self, known: Naming) -> Mapping[str, tuple[tuple[str, Placement, Placements], ...]]:
        """Layer -> its modules, where those are not the layer itself under another name."""
        if known not in self._indexed:
            found: dict[str, tuple[tuple[str, Placement, Placements], ...]] = {}
            for module, places in self.modules(known).items():
                if len(places) == 1 and places[0].plain:
                    continue
                for place in places:
                    others = found.get(place.layer, ()) if place.part else ()
                    found[place.layer] = (*others, (module, place, places))
            self._indexed[known] = found
        return self._indexed[known]

    @cached_property
    def _indexed(self) -> dict[Naming, Mapping[str, tuple[tuple[str, Placement, Placements], ...]]]:
        return {}

    def has(self, known: Naming, layer: str) -> bool:
        """Whether a layer has a name in a naming; the tables of some spellings list a few modules only."""
        if known.spelling in PARTIAL:
            spelling = self.spelling(known)
            return spelling is not None and layer in self.part.homes[spelling]
        return self.exists(known)

    def exists(self, known: Naming) -> bool:
        """Whether the base model has the names that a naming refers to."""
        return known.spelling in ("diffusers", "processor", "inner", OWN) or self.spelling(known) is not None

    def name(self, known: Naming, path: str) -> str:
        """The full name of a layer, or of the module that contains it."""
        spelling = self.spelling(known)
        home = self.part.homes[spelling].get(f"{self.component}.{path}") if spelling else None
        return self._prefixed(known, self._plain(known, path) if home is None else home)

    def norm_name(self, known: Naming, path: str) -> str:
        """The full name of a norm or of a bare parameter."""
        spelling = self.spelling(known)
        home = self.part.norm_homes(spelling).get(f"{self.component}.{path}", path) if spelling else path
        return self._prefixed(known, home.removesuffix(".weight").removesuffix(".scale"))

    def is_known(self, known: Naming, name: str, places: Placements) -> bool:
        """Whether a module of a file, which is these placements, has this name in this naming."""
        if not name.startswith(known.prefix) or not self.exists(known):
            return False
        listed = self.modules(known).get(name)
        if listed is not None:
            return _rows(listed) == _rows(places)
        if len(places) != 1 or not places[0].plain:
            return False
        return name == self.name(known, places[0].layer.partition(".")[2])

    def _plain(self, known: Naming, path: str) -> str:
        if known.spelling == "processor":
            return path.replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out")
        if known.spelling == "inner":
            return path.removeprefix("model.").removeprefix("text_model.")
        if self.component.startswith("text_encoder") and self.part.modules.kind == "clip":
            return path if path == "text_projection" else f"text_model.{path}"
        return path

    def _prefixed(self, known: Naming, path: str) -> str:
        return known.prefix + (underscored(path) if known.is_flat else path)


def _rows(places: Placements) -> set[tuple[str, tuple[int, int] | None, tuple[int, int] | None, bool, bool]]:
    return {(p.layer, p.rows, p.part, p.swap_halves, p.transpose) for p in places}


class Names:
    """The names that an application finds of the modules of one base model."""

    def __init__(
        self, base: Base, components: Mapping[str, ComponentNamings], spellers: dict[str, Speller] | None = None
    ) -> None:
        self.base = base
        self.components = components
        self._spellers = {} if spellers is None else spellers  # applications may share them

    def speller(self, component: str) -> Speller:
        if component not in self._spellers:
            self._spellers[component] = Speller(self.base, component)
        return self._spellers[component]

    def namings(self, component: str) -> ComponentNamings | None:
        """The namings of a component; None if the application loads no adapters of it."""
        role = "denoiser" if component in DENOISERS else component
        known = self.components.get(role)
        if known is None and component == CONDITIONER:
            return None
        return known

    def covers(self, name: str) -> bool:
        """Whether the component of a layer or parameter has namings."""
        return self.namings(name.partition(".")[0]) is not None

    def finds(self, name: str, places: Placements) -> bool:
        """Whether the application finds a module of a file with this name and these placements."""
        component = places[0].layer.partition(".")[0]
        known = self.namings(component)
        if known is None or component not in self.base.components:
            return False
        speller = self.speller(component)
        paths = [place.layer.partition(".")[2] for place in places]
        return any(
            speller.is_known(n, name, places) and not any(known.lacks(n, path) for path in paths) for n in known.namings
        )

    def finds_vector(self, name: str, parameter: str) -> bool:
        """Whether the application finds the bias of a layer, a norm or a bare parameter with this module name."""
        component, _, path = parameter.partition(".")
        if self.base.module(parameter.rpartition(".")[0]) is not None:
            places = table(self.base).find(name, component)
            return places is not None and self.finds(name, places)
        known = self.namings(component)
        if known is None or component not in self.base.components:
            return False
        speller = self.speller(component)
        norm = path.rpartition(".")[0]
        return any(name == speller.norm_name(n, norm) and not known.lacks(n, norm) for n in known.namings)

    def usable(self, layer: str) -> Iterator[Naming]:
        """The namings in which the application finds a layer, in the order of preference."""
        component, _, path = layer.partition(".")
        known = self.namings(component)
        if known is not None:
            speller = self.speller(component)
            yield from (n for n in known.namings if speller.has(n, layer) and not known.lacks(n, path))
