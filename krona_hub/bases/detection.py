"""Detect the base model of an adapter from the names and shapes of its modules and from its metadata.

score = matched / (modules of the adapter + members of every touched pattern that the adapter lacks)

Trainers adapt whole patterns (every `attn.to_q`), so a base model with more blocks than the adapter is a wrong match.
Some base models have identical names (FLUX.1 dev and schnell; SD 2.1 and SD 2.1 base): they tie, and only metadata
can decide between them. Base models whose layers are the same altogether are one candidate with several names, and so
is a variant with another input layer (inpainting), as long as the adapter does not adapt that layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from math import prod
from typing import NamedTuple

from krona_hub.bases import catalog, catalog_index
from krona_hub.bases.base import Base
from krona_hub.bases.families import FAMILIES, equals_of
from krona_hub.bases.metadata_hints import bases_named, bases_of_prefix
from krona_hub.bases.module_spec import Placement, stored_height
from krona_hub.bases.name_patterns import NUMBER
from krona_hub.bases.name_table import NameTable, table

PROBES = 24  # sampled names that decide whether to score a base model
SPARSE = 0.5  # score below which an adapter does not show the number of blocks

Shapes = Mapping[str, tuple[int, ...] | None]  # module of a file -> shape of its delta, None if unknown
PlacesByComponent = Mapping[str, tuple[Placement, ...]]  # component -> placements


class Candidate(NamedTuple):
    """How well the modules of an adapter fit one base model."""

    base: str  # catalog name
    component: str | None  # component of all matched modules; None if there are several
    matched: int  # modules of the adapter
    modules: int  # modules of the adapter, matched or not
    total: int  # those, plus missing ones
    score: float  # matched / total
    covered: int  # layers of the base model that the adapter changes
    layers: int  # layers of the components that the adapter changes
    named: bool = False  # whether the metadata name this base model
    also: tuple[str, ...] = ()  # base models with the same layers
    variants: tuple[str, ...] = ()  # base models that differ only in layers that the adapter does not change

    @property
    def complete(self) -> bool:
        """Whether every module of the adapter fits."""
        return self.matched == self.modules

    @property
    def whole(self) -> bool:
        """Whether the adapter changes every layer of these components."""
        return self.covered == self.layers

    @property
    def names(self) -> tuple[str, ...]:
        """This base model and those with the same layers, which may be meant as well."""
        return (self.base, *self.also)


def candidates(modules: Shapes, metadata: Mapping[str, str] | None = None) -> tuple[Candidate, ...]:
    """Every base model (and component) that some modules fit, best first; `ties` has those that may be meant.

    `modules` maps module names, in any dialect, to the shape (out, in[, k…]) of the delta. Metadata only order base
    models that match as many modules; they never override names and shapes.

    >>> best = candidates({"lora_unet_mid_block_attentions_0_proj_in": (1280, 1280)})
    >>> [c.base for c in ties(best)]
    ['sd15', 'sd21-base', 'sd21', 'sdxl']
    >>> best[0].variants, best[0].covered, best[0].layers
    (('sd15-inpaint', 'sd15-instruct-pix2pix'), 1, 282)
    """
    hinted = bases_named(metadata or {}) or bases_of_prefix(modules)
    found = [c for base in _promising(modules) for c in _score(base, modules, hinted)]
    found = sorted(_without_variants(found), key=lambda c: (-c.matched, not c.named, -c.score, not c.whole))
    tied = ties(found)
    if tied and tied[0].score < SPARSE:  # these scores say nothing: the order of the catalog, better known ones first
        tied.sort(key=lambda c: _order().get(c.base, -1))
    return (*tied, *(c for c in found if c not in tied))


@cache
def _order() -> Mapping[str, int]:
    return {name: number for number, name in enumerate(FAMILIES)}


def ties(found: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that may be meant, the best first: as many matched modules, and an equal score.

    The score of an adapter that changes less than half of the layers of each kind does not count: it does not show how
    many there are. One that changes every layer of a base model is not for another one with more. If the
    metadata name some of them, the others are left out.
    """
    if not found:
        return []
    best = found[0]
    alike = [c for c in found if (c.matched, c.named, c.whole) == (best.matched, best.named, best.whole)]
    return [c for c in alike if c.score == best.score or best.score < SPARSE]


def names_of(found: Sequence[Candidate]) -> tuple[str, ...]:
    """The names of the base models that may be meant, as in `ties`, with those that have the same layers."""
    return tuple(dict.fromkeys(name for candidate in ties(found) for name in candidate.names))


def settled(found: Sequence[Candidate]) -> Candidate | None:
    """The best candidate, if nothing ties with it and no other base model has its layers; else None."""
    tied = ties(found)
    return tied[0] if len(tied) == 1 and not tied[0].also else None


def fit(base: Base, modules: Shapes) -> tuple[Candidate, ...]:
    """How well the modules fit one base model: one candidate per possible component, best first."""
    return tuple(sorted(_score(base, modules), key=lambda c: -c.score))


def _promising(modules: Shapes) -> list[Base]:
    """Base models that match about as many sampled names as the best one; scoring all names in all is too slow.

    Base models with the same layers are represented by one of them.
    """
    probes = list(modules)[:: max(1, len(modules) // PROBES)]
    hits = Counter(base for name in probes for base in _bases_with(catalog_index.components_with(name)))
    best = max(hits.values(), default=0)
    return [catalog.get(name) for name in catalog.names() if 2 * hits[name] >= best > 0 and hits[name]]


@cache
def _bases_with(files: frozenset[str]) -> tuple[str, ...]:
    return tuple(
        name
        for name, family in FAMILIES.items()
        if family.same_layers_as is None and not files.isdisjoint(family.components.values())
    )


def _without_variants(found: Sequence[Candidate]) -> list[Candidate]:
    """Count a variant as its base model where the adapter fits both equally well, unless the metadata name it."""
    plain = {(c.base, c.component): c for c in found}
    variants: dict[tuple[str, str | None], list[str]] = {}
    kept = []
    for c in found:
        of = plain.get((FAMILIES[c.base].variant_of or "", c.component)) if c.base in FAMILIES else None
        if of is None or c.named or (of.score, of.matched) != (c.score, c.matched):
            kept.append(c)
        else:
            variants.setdefault((of.base, of.component), []).append(c.base)
    return [c._replace(variants=tuple(variants.get((c.base, c.component), ()))) for c in kept]


def _score(base: Base, modules: Shapes, hinted: frozenset[str] = frozenset()) -> Iterator[Candidate]:
    """One candidate per possible component; a single one if every name states its component."""
    names = table(base)
    found = [_places(base, names, name, shape) for name, shape in modules.items()]
    owners = sorted({owner for places_of in found for owner in places_of})
    ambiguous = any(len(places_of) > 1 for places_of in found)
    equals = equals_of(base.name) if base.name in FAMILIES else (base.name,)
    named = [name for name in equals if name in hinted]
    for choice in owners if ambiguous else owners[:1]:
        chosen = [places for places_of in found if (places := _choose(places_of, choice))]
        layers = {place.layer for places in chosen for place in places}
        total = len(modules) + _lacking(base, layers)
        yield Candidate(
            base=named[0] if named else base.name,
            component=choice if ambiguous or len(owners) == 1 else None,
            matched=len(chosen),
            modules=len(modules),
            total=total,
            score=len(chosen) / total,
            covered=len(layers),
            layers=sum(len(base.components[c]) for c in {layer.partition(".")[0] for layer in layers}),
            named=bool(named),
            also=tuple(named[1:]) if named else equals[1:],
        )


def _places(base: Base, names: NameTable, name: str, shape: tuple[int, ...] | None) -> PlacesByComponent:
    return {owner: places for owner, places in names.candidates(name) if _fits(base, places, shape)}


def _choose(places_of: PlacesByComponent, component: str) -> tuple[Placement, ...] | None:
    """The placements in the chosen component, or in the only possible one."""
    if component in places_of:
        return places_of[component]
    return next(iter(places_of.values())) if len(places_of) == 1 else None


def _fits(base: Base, places: tuple[Placement, ...], shape: tuple[int, ...] | None) -> bool:
    """Whether a delta of this shape fits the placements; kernels may be flattened into the columns."""
    if shape is None:
        return True
    return (shape[0], prod(shape[1:])) == stored_matrix(base, places)


def stored_matrix(base: Base, places: tuple[Placement, ...]) -> tuple[int, int]:
    """(out, in·k…) of the stored module that these placements, of layers of `base`, are in."""
    layers = [module for place in places if (module := base.module(place.layer))]
    rows = stored_height(places, [place.height(module) for place, module in zip(places, layers, strict=True)])
    size = rows, layers[0].matrix[1]
    return size[::-1] if places[0].transpose else size


def _lacking(base: Base, layers: set[str]) -> int:
    """Number of layers that share a pattern with `layers` but are not among them."""
    members = _members(base)
    touched = {_pattern(layer) for layer in layers}
    return sum(members[pattern] for pattern in touched) - len(layers)


@cache
def _members(base: Base) -> Counter[str]:
    return Counter(_pattern(layer) for layer, _ in base.layers())


def _pattern(layer: str) -> str:
    return NUMBER.sub("{}", layer)
