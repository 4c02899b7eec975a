"""Match the vectors of a file to parameters of a base model: biases, norms and bare parameters. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from krona_hub.adapters.unknown_base import module_name
from krona_hub.bases import catalog
from krona_hub.bases.base import Base
from krona_hub.bases.module_spec import Placement, stored_height
from krona_hub.bases.name_table import table
from krona_hub.checkpoints.header import READABLE, TensorInfo
from krona_hub.errors import BaseMismatchError, ConflictError, DtypeError, KronaError
from krona_hub.formats.parsing.base_match import BaseMatch
from krona_hub.formats.parsing.keys import VectorKey
from krona_hub.formats.parsing.own_names import kept_place, own_names

_OTHER_BASE = "Specify the base model the adapter was trained on with --base."
Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class VectorTarget:
    """A parameter, and the part of a stored vector that belongs to it."""

    parameter: str  # canonical name
    shape: tuple[int, ...]
    placement: Placement

    @property
    def values(self) -> int:
        """Number of values of the parameter that the stored vector has."""
        part = self.placement.part
        return (part[1] - part[0]) * prod(self.shape[1:]) if part else prod(self.shape)


@dataclass(frozen=True)
class VectorMatch:
    """The parameters that the vectors of a file change."""

    targets: Mapping[VectorKey, tuple[VectorTarget, ...]]
    problems: Mapping[str, KronaError]  # key -> why it matches no parameter


def match_vectors(vectors: Sequence[VectorKey], tensors: Infos, match: BaseMatch) -> VectorMatch:
    """Find the parameters of each vector in the base model of the match, or by their names without one."""
    targets: dict[VectorKey, tuple[VectorTarget, ...]] = {}
    problems: dict[str, KronaError] = {}
    owners: dict[str, list[tuple[Placement, str]]] = {}
    for vector in vectors:
        try:
            found = _targets(vector, tensors[vector.key], match)
            _check_single(found, owners)
        except KronaError as error:
            problems[vector.key] = error
            continue
        targets[vector] = found
        for target in found:
            owners.setdefault(target.parameter, []).append((target.placement, vector.key))
    return VectorMatch(targets, problems)


def base_of_vectors(
    vectors: Sequence[VectorKey], tensors: Infos, component: str | None, *, is_peft: bool = False
) -> BaseMatch:
    """Return the first base model of the catalog with all these parameters, for a file without any layer.

    If no base model has them, they keep their names.
    """
    matches = [BaseMatch(base, (), {}, {}, component) for base in map(catalog.get, catalog.names())]
    fits = [match for match in matches if not match_vectors(vectors, tensors, match).problems]
    if not fits:
        rule = own_names((vector.module for vector in vectors), component, is_peft=is_peft)
        return BaseMatch(None, (), {}, {}, component, rule)
    names = tuple(match.base.name for match in fits if match.base)
    return BaseMatch(fits[0].base, names, {}, {}, component)


def kept_parameter(name: str, shape: tuple[int, ...], base: Base) -> str:
    """Return the parameter of `base` with the name that an adapter of an unknown base model kept, else that name."""
    own = module_name(name)
    if own is None:
        return name
    module, _, part = own.rpartition(".")
    for path, end in ((module, f".{part}"), (own, "")):
        places = (table(base).vector_places(path) if path else None) or ()
        if len(places) == 1 and places[0].plain and base.parameter(f"{places[0].layer}{end}") == shape:
            return f"{places[0].layer}{end}"
    return name


def _check_single(targets: Sequence[VectorTarget], owners: Mapping[str, list[tuple[Placement, str]]]) -> None:
    others = ((t.placement, place, key) for t in targets for place, key in owners.get(t.parameter, ()))
    taken = next((key for own, place, key in others if own.overlaps(place)), None)
    if taken:
        raise ConflictError(
            f"The tensor changes the same parameter as {taken}.", fix="Keep only one of the two adapters in the file."
        )


def _targets(vector: VectorKey, info: TensorInfo, match: BaseMatch) -> tuple[VectorTarget, ...]:
    if info.dtype not in READABLE or not info.numel:
        raise DtypeError(f"Unsupported tensor {info.dtype} {list(info.shape)}.", fix="Use the original file.")
    name = vector.module
    if vector.parameter == "modulation":
        name += ".modulation" if "." in name else "_modulation"
    if match.base is None:
        layer = match.own_names.layer(name)
        return (VectorTarget(_parameter(layer, vector, None), info.shape, Placement(layer)),)
    places = kept_place(match.base, name) or table(match.base).vector_places(name, match.component)
    if places is None:
        raise BaseMismatchError(f"{match.base.name} has no such module.", fix=_OTHER_BASE)
    found = [_target(place, vector, match.base) for place in places]
    size = stored_height(places, [target.values for target in found])
    if size != info.numel:
        raise BaseMismatchError(
            f"The vector has {info.numel} values, but the parameter of {match.base.name} has {size}.", fix=_OTHER_BASE
        )
    return tuple(found)


def _target(place: Placement, vector: VectorKey, base: Base) -> VectorTarget:
    parameter = _parameter(place.layer, vector, base)
    shape = base.parameter(parameter)
    if shape is None and vector.parameter == "weight" and base.module(place.layer) is not None:
        raise BaseMismatchError(
            f"{place.layer} is a layer, not a norm.", fix="Save the adapter again with the application that wrote it."
        )
    if shape is None:
        raise BaseMismatchError(f"{base.name} has no parameter {parameter}.", fix=_OTHER_BASE)
    return VectorTarget(parameter, shape, place)


def _parameter(layer: str, vector: VectorKey, base: Base | None) -> str:
    """The canonical name of a parameter: a bare one is its own path."""
    is_bare = vector.parameter == "modulation" if base is None else base.parameter(layer) is not None
    return layer if is_bare else f"{layer}.{vector.parameter}"
