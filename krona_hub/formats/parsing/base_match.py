"""Match a file to a base model, and each of its modules to layers of that model. Torch-free.

All names decide together: `lycoris_encoder_layers_0_…` fits both text encoders of SDXL, but the whole file fits one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from krona_hub.adapters.unknown_base import module_name
from krona_hub.bases import catalog, detection, name_prefixes
from krona_hub.bases.base import Base
from krona_hub.bases.module_spec import Placement
from krona_hub.bases.name_table import NameTable, table
from krona_hub.errors import AmbiguousError, BaseMismatchError, KronaError, counted, one_of
from krona_hub.formats.parsing.foreign import unsupported
from krona_hub.formats.parsing.own_names import OwnNames, kept_place, own_names

INPUT_LAYERS = (".x_embedder", ".img_in", ".patch_embedding", ".pos_embed.proj")
NEXT_BEST = 2  # base models to name besides the best ones
HINTS = 8  # modules per file to suggest a name for; each search takes milliseconds
Placements = tuple[Placement, ...]
Shapes = Mapping[str, tuple[int, ...]]  # module of a file -> shape of the weight, as implied by its tensors


@dataclass(frozen=True)
class BaseMatch:
    """The base model of a file, and the layers that its modules adapt."""

    base: Base | None  # None: no known base model; layers come from the names alone, by `own_names`
    candidates: tuple[str, ...]  # catalog names that fit equally well
    places: Mapping[str, Placements]  # module -> layers
    problems: Mapping[str, KronaError]  # module -> why it matches no layer
    component: str | None = None  # of names without a prefix
    own_names: OwnNames = field(default_factory=OwnNames)
    fits: tuple[detection.Candidate, ...] = ()  # how well base models fit: those that tie, then the next best
    mismatch: BaseMismatchError | None = None  # the given base model is another one than that of the file


def match_base(
    shapes: Shapes, metadata: Mapping[str, str], base: Base | None, component: str | None, *, is_peft: bool = False
) -> BaseMatch:
    """Find the layers of each module, and the base model if none is given; without any, the modules keep their names.

    Raises AmbiguousError if several components fit equally well.
    """
    if base is not None:
        fits = detection.fit(base, shapes)
        owner = _component(fits, component, len(shapes))
        match = _in_base(shapes, base, owner, base.candidates or ((base.family,) if base.family else ()))
        return replace(match, fits=fits[:1], mismatch=wrong_base(base, match, shapes, metadata))
    found = [
        c for c in detection.candidates(shapes, metadata) if component in (None, c.component) or c.component is None
    ]
    whole = [c for c in found if c.matched == len(shapes)]
    if whole:
        return _in_catalog(shapes, whole, component)
    if found and 2 * found[0].matched >= len(shapes):
        return _in_catalog(shapes, found, component)  # the base model is known, but some modules do not match
    names = own_names(shapes, component, is_peft=is_peft)
    places = {name: (Placement(names.layer(name)),) for name in shapes}
    return BaseMatch(None, (), places, {}, component, names)


def places_of_kept(shapes: Shapes, base: Base) -> dict[str, Placements]:
    """Find in `base` the layers of an unknown base model, whose names are those of their file: layer -> placements."""
    own = {layer: module for layer in shapes if (module := module_name(layer)) is not None}
    if not own:
        return {}
    found = match_base({module: shapes[layer] for layer, module in own.items()}, {}, base, None).places
    return {layer: found[module] for layer, module in own.items() if module in found}


def _in_catalog(shapes: Shapes, found: list[detection.Candidate], component: str | None) -> BaseMatch:
    best, ties = found[0], detection.ties(found)
    owner = _component([c for c in ties if c.base == best.base], component, len(shapes))
    others = [c for c in found if c not in ties][:NEXT_BEST]
    match = _in_base(shapes, catalog.get(best.base), owner, detection.names_of(found))
    return replace(match, fits=(*ties, *others))


def wrong_base(base: Base, match: BaseMatch, shapes: Shapes, metadata: Mapping[str, str]) -> BaseMismatchError | None:
    """Return the one error of a file that is not for this base model; None if it is, but for some modules.

    It is for another one if that has more of its modules, or if this one has less than half of them.
    """
    total, matched = len(shapes), len(match.places)
    if not any(isinstance(problem, BaseMismatchError) for problem in match.problems.values()):
        return None
    found = detection.candidates(shapes, metadata)
    better = found[0] if found and found[0].matched > matched else None
    if better is None and 2 * matched >= total:
        return None
    share = f"{matched:,} of {counted(total, 'module')} fit"
    if better is None:
        name, problem = next(iter(match.problems.items()))
        return BaseMismatchError(
            f"This is not an adapter of {base.name}: {share}, and no known base model fits better. First: {name}: "
            f"{problem.cause}",
            fix="Check that --base is the model the adapter was trained on.",
        )
    how = "completely" if better.complete else f"with {better.matched:,} of {total:,}"
    names = one_of(detection.names_of(found))
    return BaseMismatchError(
        f"This is not an adapter of {base.name}: {share}; it fits {names} {how}.",
        fix=f"Use --base {names}, or omit --base.",
    )


def _component(found: Sequence[detection.Candidate], requested: str | None, total: int) -> str | None:
    """The component of names without a prefix: the requested one, or the one that fits best."""
    if requested is not None or not found:
        return requested
    most = max(c.matched for c in found)
    best = [c.component for c in found if c.matched == most]
    if len(best) > 1 and most:
        raise AmbiguousError(
            f"The modules fit {' and '.join(map(str, best))} of {found[0].base} equally well ({most} of {total}).",
            fix=f"Choose one with --component, e.g. --component {best[0]}.",
        )
    return best[0]


def _in_base(shapes: Shapes, base: Base, component: str | None, candidates: tuple[str, ...]) -> BaseMatch:
    names = table(base)
    places: dict[str, Placements] = {}
    problems: dict[str, KronaError] = {}
    for name, shape in shapes.items():
        try:
            places[name] = _place(names, name, shape, component, hint=len(problems) < HINTS)
        except KronaError as error:
            problems[name] = error
    return BaseMatch(base, candidates, places, problems, component)


def _place(
    names: NameTable, name: str, shape: tuple[int, ...], component: str | None, *, hint: bool = True
) -> Placements:
    """The placements of one module. Raises BaseMismatchError if the base lacks it or has another shape."""
    found = dict(names.candidates(name))
    places = kept_place(names.base, name) or found.get(component or "")
    if places is None and len(found) == 1:
        places = next(iter(found.values()))
    if places is None and len(found) > 1:
        raise AmbiguousError(f"The module exists in {' and in '.join(found)}.", fix="Choose one with --component.")
    if places is None:
        raise _unmatched(names, name, hint)
    wanted = detection.stored_matrix(names.base, places)
    given = shape[0], prod(shape[1:])
    if given != wanted:
        if given == (wanted[0], 2 * wanted[1]) and places[0].layer.endswith(INPUT_LAYERS):
            raise unsupported("control LoRA", f" (an input layer of {given[1]} instead of {wanted[1]} channels)")
        raise BaseMismatchError(
            f"The delta is {given[0]}x{given[1]}, but the layer of {names.base.name} is {wanted[0]}x{wanted[1]}.",
            fix="Specify the base model the adapter was trained on with --base.",
        )
    return places


def _unmatched(names: NameTable, name: str, hint: bool) -> KronaError:
    lacking = name_prefixes.lacking(name, names.base)
    if lacking:
        return BaseMismatchError(f"{names.base.name} has no {lacking}.", fix="Specify the whole model with --base.")
    near = names.nearest(name) if hint else None
    return BaseMismatchError(
        f"{names.base.name} has no such module.",
        fix=f"The nearest layer is {near}." if near else "Check that --base is the model the adapter was trained on.",
    )
