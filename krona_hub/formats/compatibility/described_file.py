"""A described adapter file, prepared for the questions of many applications. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from krona_hub.bases import catalog
from krona_hub.bases.base import Base
from krona_hub.bases.families import FAMILIES
from krona_hub.formats.compatibility.module_rules import StoredModule
from krona_hub.formats.compatibility.naming import ComponentNamings, Names, Naming, Speller
from krona_hub.formats.forms.delta_form import LayerFactorization
from krona_hub.formats.reading.description import Description


@dataclass(frozen=True, eq=False)
class DescribedFile:
    """A description, and what its rules and names are asked about."""

    description: Description
    spellers: dict[str, Speller] = field(default_factory=dict)  # component -> its names, shared by the applications

    @cached_property
    def own(self) -> Base | None:
        """The base model whose layers the modules were matched with."""
        plans = self.description.plans
        return next((plan.match.base for plan in plans if plan.match.base is not None), None)

    @cached_property
    def bases(self) -> tuple[Base, ...]:
        """The base model of the file, or those that fit equally well; () if none is known."""
        own, candidates = self.own, self.description.candidates
        if own is None:
            return ()
        others = [name for name in candidates if name != own.name and name in FAMILIES]
        return (own, *map(catalog.get, others)) if own.family in candidates else (own,)

    @cached_property
    def modules(self) -> tuple[StoredModule, ...]:
        """The modules that are read; none of a native file, which no other application reads."""
        return tuple(self._stored()) if self.description.plans else ()

    def _stored(self) -> Iterator[StoredModule]:
        plans = [(plan, module) for plan in self.description.plans for module in plan.modules]
        for (plan, module), info in zip(plans, self.description.modules, strict=True):
            parts = {part: plan.file.header.tensors[key] for part, key in module.group.parts.items()}
            yield StoredModule(info, parts, module.group.parts, module.places)

    @cached_property
    def variant(self) -> str:
        """The format, with `+alpha` for diffusers LoRA keys beside stored alphas, which some loaders refuse."""
        has_alpha = any("alpha" in module.parts for module in self.modules)
        name = self.description.format
        return f"{name}+alpha" if name == "diffusers-lora" and has_alpha else name

    @cached_property
    def formats(self) -> tuple[str, ...]:
        """Formats whose rejection concerns the file: its own, `…+named` for keys that name an adapter, and LoHa."""
        own = self.description.format
        named = any(".default." in key for module in self.modules for key in module.keys.values())
        return (own, *([f"{own}+named"] if named else []), *(["lycoris-loha"] if "loha" in self.kinds else []))

    @cached_property
    def members(self) -> Mapping[str, tuple[StoredModule, ...]]:
        """Component -> its modules."""
        found: dict[str, list[StoredModule]] = {}
        for module in self.modules:
            if module.places:
                found.setdefault(module.places[0].layer.partition(".")[0], []).append(module)
        return {component: tuple(own) for component, own in found.items()}

    def named(self, known: Naming, component: str) -> frozenset[str]:
        """The modules of a component with names of a naming; computed once for all applications."""
        if (known, component) not in self._named:
            speller = self.speller(component)
            own = self.members[component]
            self._named[known, component] = frozenset(
                m.info.name for m in own if speller.is_known(known, m.info.name, m.places)
            )
        return self._named[known, component]

    @cached_property
    def _named(self) -> dict[tuple[Naming, str], frozenset[str]]:
        return {}

    def speller(self, component: str) -> Speller:
        if component not in self.spellers and self.own is not None:
            self.spellers[component] = Speller(self.own, component)
        return self.spellers[component]

    def found(self, names: Names) -> set[str]:
        """The modules whose names an application finds."""
        result: set[str] = set()
        for component, own in self.members.items():
            known = names.namings(component)
            for n in known.namings if known else ():
                named = self.named(n, component)
                if known and n in known.missing and named:
                    named = named - {m.info.name for m in own if _lacks(known, n, m)}
                result |= named
        return result

    @cached_property
    def forms(self) -> Mapping[str, LayerFactorization]:
        """Module -> its factorization without the name of the layer, so that equal ones are answered once."""
        return {
            m.info.name: LayerFactorization(m.info.weight_shape, m.info.sums, m.info.dora_axis) for m in self.modules
        }

    @cached_property
    def kinds(self) -> frozenset[str]:
        """The kinds of the modules: lora, lokr, …"""
        return frozenset(m.kind for m in self.description.modules)

    @cached_property
    def layers(self) -> frozenset[str]:
        """The layers that the modules change."""
        return frozenset(layer for m in self.description.modules for layer in m.layers)

    @cached_property
    def unread(self) -> int:
        """Number of modules that are not read, so that nothing can be claimed about them."""
        vectors = {vector.key for plan in self.description.plans for vector in plan.file.keys.vectors}
        return len(self.description.unmatched.keys() - vectors)


def _lacks(known: ComponentNamings, naming: Naming, module: StoredModule) -> bool:
    """Whether the application does not find a layer of the module in the naming."""
    return any(known.lacks(naming, place.layer.partition(".")[2]) for place in module.places)
