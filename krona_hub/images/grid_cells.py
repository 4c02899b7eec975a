"""The images of a grid: columns (a base and adapters at strengths) by rows (a prompt and a seed). Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from krona_hub.images.request import GenerateRequest, stem_of

OTHER = re.compile(r"[^\w-]+")  # characters that an adapter's name, as a torch module's, should not have
WITHOUT = "base"  # the label of the column without adapters


@dataclass(frozen=True)
class Column:
    """A base and adapters, shared by all images of a column."""

    label: str
    base: str  # source
    weights: Mapping[str, float] = field(default_factory=dict)  # adapter name -> strength, none of them 0


class GridRow(NamedTuple):
    """A prompt and a seed, shared by all images of a row."""

    prompt: str
    seed: int


def rows_of(request: GenerateRequest) -> tuple[GridRow, ...]:
    """Return every prompt with every seed, prompt by prompt."""
    return tuple(GridRow(prompt, seed) for prompt in request.prompts for seed in request.seeds)


def columns_of(request: GenerateRequest, names: Sequence[str]) -> tuple[Column, ...]:
    """Return the requested columns in order, without duplicates. `names` are those of the adapters."""
    own = {name: weight for name, (_, weight) in zip(names, request.adapters, strict=True)}
    groups = [own] if request.together else [{name: weight} for name, weight in own.items()]
    compare = len(groups) > 1 if request.compare is None else request.compare
    sets: list[Mapping[str, float]] = [] if groups and not compare else [{}]
    sets += [{n: w * s for n, w in group.items()} for group in groups for s in request.strengths or (1.0,)]
    several = len(sets) + len(request.beside) > 1
    found = [_column(request.base, weights, bool(request.strengths), several) for weights in sets]
    found += [Column(stem_of(base), base) for base in request.beside]
    return _unique(found)


def _column(base: str, weights: Mapping[str, float], always: bool, several: bool) -> Column:
    kept = {name: round(weight, 12) for name, weight in weights.items() if weight}
    label = " + ".join(_label(name, weight, always) for name, weight in kept.items())
    return Column(label or (WITHOUT if several else stem_of(base)), base, kept)


def _label(name: str, weight: float, always: bool) -> str:
    """
    >>> _label("style", 1.0, False), _label("style", 0.5, False), _label("style", 1.0, True)
    ('style', 'style × 0.5', 'style × 1')
    """
    return f"{name} × {weight:g}" if always or weight != 1 else name


def _unique(columns: Sequence[Column]) -> tuple[Column, ...]:
    found: dict[tuple[object, ...], Column] = {}
    for column in columns:
        found.setdefault((column.base, *sorted(column.weights.items())), column)
    return tuple(found.values())


def names_of(sources: Sequence[str]) -> tuple[str, ...]:
    """Name each adapter after its file, with a number appended where names collide.

    >>> names_of(["a/style.safetensors", "b/style.safetensors", "ns/toy.v1"])
    ('style', 'style-2', 'toy-v1')
    """
    names: list[str] = []
    for source in sources:
        stem = OTHER.sub("-", stem_of(source)).strip("-") or "adapter"
        names.append(next(name for name in _numbered(stem) if name not in names))
    return tuple(names)


def _numbered(stem: str) -> Iterator[str]:
    yield stem
    number = 2
    while True:
        yield f"{stem}-{number}"
        number += 1
