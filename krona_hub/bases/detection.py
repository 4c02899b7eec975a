"""Detect the base model of an adapter from the names and shapes of its modules and from its metadata.

score = matched / (modules of the adapter + members of every touched pattern that the adapter lacks)

Trainers adapt whole patterns (every `attn.to_q`), so a base model with more blocks than the adapter is a wrong match.
Some base models have identical names (FLUX.1 dev and schnell; SD 2.1 and SD 2.1 base): they tie, and only metadata
can decide between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from math import prod
from typing import NamedTuple

from krona_hub.bases import catalog
from krona_hub.bases.base import Base
from krona_hub.bases.metadata_hints import bases_named
from krona_hub.bases.module_spec import Placement, stored_height
from krona_hub.bases.name_patterns import NUMBER
from krona_hub.bases.name_table import NameTable, table

PROBES = 24  # sampled names that decide whether to score a base model

Shapes = Mapping[str, tuple[int, ...] | None]  # module of a file -> shape of its delta, None if unknown
PlacesByComponent = Mapping[str, tuple[Placement, ...]]  # component -> placements


class Candidate(NamedTuple):
    """How well the modules of an adapter fit one base model."""

    base: str  # catalog name
    component: str | None  # component of all matched modules; None if there are several
    matched: int  # modules
    total: int  # modules of the adapter, plus missing ones
    score: float  # matched / total
    named: bool = False  # whether the metadata name this base model


def candidates(modules: Shapes, metadata: Mapping[str, str] | None = None) -> tuple[Candidate, ...]:
    """Every base model (and component) that some modules fit, best first; equal scores are ties.

    `modules` maps module names, in any dialect, to the shape (out, in[, k…]) of the delta. Metadata only order base
    models of equal score; they never override names and shapes.

    >>> best = candidates({"lora_unet_mid_block_attentions_0_proj_in": (1280, 1280)})
    >>> [c.base for c in best if c.score == best[0].score]
    ['sd15', 'sd21-base', 'sd21', 'sdxl']
    """
    hinted = bases_named(metadata or {})
    found = [c for base in _promising(modules) for c in _score(base, modules, base.name in hinted)]
    return tuple(sorted(found, key=lambda c: (-c.score, not c.named, -c.matched)))


def settled(found: Sequence[Candidate]) -> Candidate | None:
    """The best candidate, if it is unique or the only tied one that the metadata name; else None."""
    ties = [c for c in found if c.score == found[0].score] if found else []
    named = [c for c in ties if c.named]
    only = named or ties
    return only[0] if len(only) == 1 else None


def fit(base: Base, modules: Shapes) -> tuple[Candidate, ...]:
    """How well the modules fit one base model: one candidate per possible component, best first."""
    return tuple(sorted(_score(base, modules, False), key=lambda c: -c.score))


def _promising(modules: Shapes) -> list[Base]:
    """Base models that match about as many sampled names as the best one; scoring all names in all is too slow."""
    probes = list(modules)[:: max(1, len(modules) // PROBES)]
    known = {}
    for base in map(catalog.get, catalog.names()):
        names = table(base)
        known[base] = sum(bool(names.candidates(name)) for name in probes)
    best = max(known.values())
    return [base for base, count in known.items() if count and 2 * count >= best]


def _score(base: Base, modules: Shapes, named: bool) -> Iterator[Candidate]:
    """One candidate per possible component; a single one if every name states its component."""
    names = table(base)
    found = [_places(base, names, name, shape) for name, shape in modules.items()]
    owners = sorted({owner for places_of in found for owner in places_of})
    ambiguous = any(len(places_of) > 1 for places_of in found)
    for choice in owners if ambiguous else owners[:1]:
        chosen = [places for places_of in found if (places := _choose(places_of, choice))]
        layers = {place.layer for places in chosen for place in places}
        total = len(modules) + _lacking(base, layers)
        component = choice if ambiguous or len(owners) == 1 else None
        yield Candidate(base.name, component, len(chosen), total, len(chosen) / total, named)


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
