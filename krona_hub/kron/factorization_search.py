"""Choice of a Kronecker factorization for each layer of a LoRA: the smallest within an error, or the best for a budget.

The candidates are those of `candidates.py`: every divisor shape, every number of terms, right factors dense or of one
rank; the LoRA itself, complete or truncated, is always one of them. The result equals that of an exhaustive search,
which `best_first.py` avoids.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import inf, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.aliases import Progress
from krona_hub.errors import InexpressibleError, UsageError
from krona_hub.kron.allocation import Point, smallest_budget, spend
from krona_hub.kron.best_first import Allowed, Goal, Search
from krona_hub.kron.candidates import (
    ROUNDING,
    Factorization,
    is_lora,
    most_right_rank,
    nothing,
    parameters_of,
    realize,
)
from krona_hub.kron.parallel import in_processes
from krona_hub.kron.rearrangement import LoraSvd
from krona_hub.kron.shapes import KronShape, choices, divisors, split

__all__ = [
    "Choice", "Factorization", "error_of", "frontier", "realize", "smallest_lora_error", "smallest_within",
    "within_budget",
]  # fmt: skip

TOGETHER = 24  # layers searched at once: more share more products, fewer need less memory
ROUNDS = 3  # updates of the price of a parameter, each with all factorizations found so far
LADDER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.02, 0.01)  # default error limits of a frontier

Pair = tuple[Tensor, Tensor]  # up (out, r), down (r, in)


class Choice(NamedTuple):
    """The chosen factorization of one layer."""

    form: Factorization
    best_other: Factorization | None  # if `form` is the LoRA itself: the best alternative


def smallest_within(
    loras: Sequence[Pair],
    max_error: float,
    *,
    allowed: Allowed | None = None,
    others_within: float = inf,
    progress: Progress | None = None,
) -> list[Choice]:
    """Return, per layer, the factorization with the fewest parameters whose relative error is at most `max_error`.

    `allowed(shape, terms, right_rank)` restricts the candidates. At equal size the LoRA itself is preferred, then fewer
    terms. If the LoRA itself is within the error, alternatives are searched up to `others_within` times its size:
    otherwise the search among few allowed candidates takes long if none is small. Errors below 1e-12 count as zero.
    Raises UsageError for a negative or NaN error, InexpressibleError if no allowed candidate is within the error.

    >>> up, down = torch.kron(torch.eye(4), torch.ones(6, 1)), torch.kron(torch.eye(4), torch.ones(1, 6))
    >>> form = smallest_within([(up, down)], 0.01)[0].form
    >>> str(form), form.parameters
    ('1 × 4x4 ⊗ 6x6, B of rank 1', 28)
    """
    if not max_error >= 0:
        raise UsageError(f"Invalid maximum error {max_error}.", fix="Choose an error of 0 or more.")

    def work(members: list[int]) -> list[Choice]:
        group = _group(loras, members)
        return _smallest(group.lora, group.norms, max_error, allowed, others_within)

    choices_of = dict[int, Choice]()
    for members, found in in_processes(work, _batches(loras)):
        choices_of |= zip(members, found, strict=True)
        if progress:
            progress(len(choices_of), len(loras))
    return [choices_of[i] for i in range(len(loras))]


def error_of(up: Tensor, down: Tensor, shape: KronShape | tuple[int, int], terms: int = 1) -> float:
    """Return the relative error of the nearest sum of `terms` products of one shape."""
    full = split((up.shape[0], down.shape[1]), shape[0], shape[1])
    return realize(up, down, Factorization(full, terms, None, parameters_of(full, terms, None), 0.0)).relative_error


def frontier(
    up: Tensor, down: Tensor, errors: Sequence[float] = LADDER, *, allowed: Allowed | None = None
) -> list[Factorization]:
    """Return the smallest factorization within each of `errors`, without duplicates, sorted by size."""
    found = {smallest_within([(up, down)], e, allowed=allowed)[0].form for e in errors}
    return sorted(found, key=lambda form: form.order)


# --- layers of one size ----------------------------------------------------------------------------------------------


class _Group(NamedTuple):
    """A batch of layers of one size."""

    members: list[int]  # their indices in the list
    lora: LoraSvd  # of unit norm, except zero layers
    norms: Tensor  # (n,)


def _batches(loras: Sequence[Pair]) -> list[list[int]]:
    """Return the indices of layers of one size and rank, in batches of at most TOGETHER."""
    by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, (up, down) in enumerate(loras):
        by_size[up.shape[0], down.shape[1], up.shape[1]].append(i)
    return [m[start : start + TOGETHER] for m in by_size.values() for start in range(0, len(m), TOGETHER)]


def _group(loras: Sequence[Pair], members: list[int]) -> _Group:
    ups, downs = (torch.stack([loras[i][side].double() for i in members]) for side in (0, 1))
    lora = LoraSvd.of(ups, downs)
    norms = lora.s.norm(dim=1)
    return _Group(members, replace(lora, s=lora.s / norms.where(norms > 0, 1.0)[:, None]), norms)


def _smallest(
    lora: LoraSvd, norms: Tensor, max_error: float, allowed: Allowed | None, others_within: float
) -> list[Choice]:
    own = [
        _smallest_lora(s, lora.size, max_error, allowed) if n > 0 else None for s, n in zip(lora.s, norms, strict=True)
    ]
    other: list[Factorization | None] = [None] * len(own)
    alive = (norms > 0).nonzero()[:, 0]
    if len(alive):
        goal = Goal(torch.ones(len(alive), dtype=torch.float64), max_error)
        known = [inf if (form := own[at]) is None else others_within * form.parameters for at in alive.tolist()]
        roof = torch.minimum(_roof(lora.take(alive), allowed), torch.tensor(known, dtype=torch.float64))
        search = Search(lora.take(alive), goal, roof, allowed).run()
        for at, found in zip(alive.tolist(), search.found, strict=True):
            other[at] = found.form if found else None
    for at in (norms == 0).nonzero()[:, 0].tolist():
        other[at] = _smallest_form(lora.size, allowed, 0.0)
    return [_better(a, b, max_error) for a, b in zip(own, other, strict=True)]


def _better(lora: Factorization | None, other: Factorization | None, max_error: float) -> Choice:
    if lora is not None and (other is None or lora.order < other.order):
        return Choice(lora, other)
    if other is None:
        raise InexpressibleError(
            f"no allowed factorization is within an error of {max_error:g}.",
            fix="Increase the maximum error, or choose a format that can store the LoRA itself.",
        )
    return Choice(other, None)


def _lora_forms(s: Tensor, size: tuple[int, int], allowed: Allowed | None) -> Iterator[Factorization]:
    """Yield the truncated LoRAs of one layer by rank, each in the first allowed shape."""
    left = s.square().flip(0).cumsum(0).flip(0).sqrt() / s.norm().clamp(min=1e-300)
    for rank in range(1, len(s) + 1):
        error = float(left[rank]) if rank < len(s) else 0.0
        for shape, terms, right in _lora_shapes(size, rank):
            if allowed is None or allowed(shape, terms, right):
                yield Factorization(shape, terms, right, rank * sum(size), error)
                break


def _lora_shapes(size: tuple[int, int], rank: int) -> Iterator[tuple[KronShape, int, int | None]]:
    out, in_ = size
    yield KronShape(1, 1, out, in_), 1, rank
    yield KronShape(out, 1, 1, in_), rank, None
    yield KronShape(1, in_, out, 1), rank, None


def _smallest_lora(s: Tensor, size: tuple[int, int], max_error: float, allowed: Allowed | None) -> Factorization | None:
    return next((f for f in _lora_forms(s, size, allowed) if f.relative_error <= max(max_error, ROUNDING)), None)


def _roof(lora: LoraSvd, allowed: Allowed | None) -> Tensor:
    """Return, for every layer, a size within which some alternative to the LoRA is guaranteed to be exact."""
    sizes = [parameters_of(*form) for form in _exact_forms(lora) if allowed is None or allowed(*form)]
    return torch.full((len(lora.s),), float(min(sizes, default=torch.inf)), dtype=torch.float64)


def _exact_forms(lora: LoraSvd) -> Iterator[tuple[KronShape, int, int | None]]:
    """Yield factorizations that represent any LoRA of this rank: the dense matrix, and stacked or adjacent LoRAs."""
    (out, in_), rank = lora.size, lora.s.shape[1]
    yield KronShape(1, 1, out, in_), 1, None
    for p in divisors(out)[1:2]:
        stacked = KronShape(p, 1, out // p, in_)
        yield stacked, p, rank if rank <= most_right_rank(stacked) else None
    for p in divisors(in_)[1:2]:
        abreast = KronShape(1, p, out, in_ // p)
        yield abreast, p, rank if rank <= most_right_rank(abreast) else None


def _smallest_form(size: tuple[int, int], allowed: Allowed | None, error: float) -> Factorization | None:
    """Return the smallest factorization that is not a LoRA, whatever its error."""
    forms = (
        Factorization(shape, 1, rank, parameters_of(shape, 1, rank), error)
        for shape in choices(*size)
        for rank in ([None, 1] if most_right_rank(shape) else [None])
        if not is_lora(shape, rank) and (allowed is None or allowed(shape, 1, rank))
    )
    return min(forms, key=lambda form: form.order, default=None)


# --- budget ----------------------------------------------------------------------------------------------------------


def within_budget(
    loras: Sequence[Pair],
    parameters: int,
    *,
    allowed: Allowed | None = None,
    required: Collection[int] = (),
    progress: Progress | None = None,
) -> list[Choice]:
    """Return the factorizations of all layers that minimize the total squared error within `parameters` values.

    Each step spends the budget where a parameter gains most: along the convex hull of each layer's (size, squared
    error) points, then on what still fits. A layer may be left out (`Factorization.is_nothing`), at the loss of all of
    its energy, unless its index is in `required`. The result never has a larger error than the best truncated LoRAs
    within the budget. Raises UsageError, naming the smallest possible budget, if the required layers exceed the budget,
    or if it does not hold the smallest factorization of any layer; InexpressibleError if `allowed` excludes all
    factorizations of a layer.

    >>> up, down = torch.ones(6, 1), torch.ones(1, 8)
    >>> [str(choice.form) for choice in within_budget([(up, down), (0.1 * up, down)], 14)]
    ['LoRA of rank 1', 'left out']
    """
    groups = [_group(loras, members) for members in _batches(loras)]
    points = _first_points(loras, groups, allowed, required)
    chosen, price = _spent(points, parameters)
    allocations = [*_truncated(points, parameters), chosen]
    total = ROUNDS * len(loras)
    for turn in range(ROUNDS):
        done = turn * len(loras)
        work = partial(_more_points, points, price, allowed)
        for group, found in in_processes(work, groups):
            for i, more in found.items():
                points[i] += more
            done += len(group.members)
            if progress:
                progress(done, total)
        (chosen, now), before = _spent(points, parameters), price
        allocations.append(chosen)
        price = now
        if abs(price - before) <= 0.05 * before:
            break
    if progress:
        progress(total, total)
    best = min(reversed(allocations), key=_lost)  # the greedy choice among more candidates may be worse
    return [_with_other(point, rest, price) for point, rest in zip(best, points, strict=True)]


def _spent(points: list[list[Point]], parameters: int) -> tuple[list[Point], float]:
    """Return what `spend` returns; if the budget did not run out, the average gain of a parameter as the price.

    Without a price there would be no search: a format that holds no LoRA would get the smallest forms for any budget.
    """
    chosen, price = spend(points, parameters)
    return chosen, price or _lost(chosen) / parameters


def smallest_lora_error(singular_values: Sequence[Tensor], sizes: Sequence[tuple[int, int]], parameters: int) -> float:
    """Return the total relative error of the best LoRAs of layers within `parameters` values; 0.0 for zero layers.

    Layers may be left out. It needs only the singular values of each layer and its (out, in). Raises UsageError if the
    budget does not hold rank 1 of any layer.
    """
    energies = [float(s.square().sum()) for s in singular_values]
    points = [
        [_point(form, energy) for form in (nothing(size), *_lora_forms(s, size, None))]
        for s, size, energy in zip(singular_values, sizes, energies, strict=True)
    ]
    chosen, _ = spend(points, parameters)
    whole = sum(energies)
    return sqrt(_lost(chosen) / whole) if whole else 0.0


def _lost(chosen: Sequence[Point]) -> float:
    return sum(point.loss for point in chosen)


def _first_points(
    loras: Sequence[Pair], groups: list[_Group], allowed: Allowed | None, required: Collection[int]
) -> list[list[Point]]:
    """Return, per layer, the truncated LoRAs, the smallest factorization, and none if the layer may be left out."""
    points: list[list[Point]] = [[] for _ in loras]
    for members, lora, norms in groups:
        smallest = _smallest_form(lora.size, allowed, 1.0)
        for i, s, norm in zip(members, lora.s, norms, strict=True):
            energy = float(norm) ** 2
            points[i] += [_point(f, energy) for f in _lora_forms(s, lora.size, allowed)]
            if smallest is not None:
                error = realize(*loras[i], smallest).relative_error
                points[i].append(_point(replace(smallest, relative_error=error), energy))
        if not all(points[i] for i in members):
            raise InexpressibleError(
                "the format allows no factorization of a layer.", fix="Choose a format that supports more shapes."
            )
        for i, norm in zip(members, norms, strict=True):
            if i not in required:
                points[i].append(_point(nothing(lora.size), float(norm) ** 2))
    return points


def _truncated(points: list[list[Point]], parameters: int) -> list[list[Point]]:
    """Return the best truncated LoRAs within the budget, the plain choice; [] if they do not fit it."""
    plain = [[p for p in layer if p.form.is_lora or p.form.is_nothing] for layer in points]
    fits = all(plain) and smallest_budget(plain)[0] <= parameters
    return [spend(plain, parameters)[0]] if fits else []


def _more_points(
    points: list[list[Point]], price: float, allowed: Allowed | None, group: _Group
) -> dict[int, list[Point]]:
    """Return, per layer, all factorizations found in the search for the best one at this price of a parameter."""
    members, lora, norms = group
    alive = (norms > 0).nonzero()[:, 0]
    if not len(alive) or not price:
        return {}
    prices = price / norms[alive].square()
    energies = norms[alive].square().tolist()
    known = [
        min(_relative_value(p, price, energy) for p in points[members[at]])
        for at, energy in zip(alive.tolist(), energies, strict=True)
    ]
    search = Search(lora.take(alive), Goal(prices, None), torch.tensor(known, dtype=torch.float64), allowed).run()
    return {
        members[at]: [_point(form, float(norms[at]) ** 2) for form in forms]
        for at, forms in zip(alive.tolist(), search.points, strict=True)
    }


def _relative_value(point: Point, price: float, energy: float) -> float:
    return (point.loss + price * point.parameters) / energy


def _point(form: Factorization, energy: float) -> Point:
    return Point(form.parameters, form.relative_error**2 * energy, form)


def _with_other(point: Point, points: list[Point], price: float) -> Choice:
    """Return the chosen factorization and, if it is the LoRA, the best alternative at the final price."""
    others = [p for p in points if not p.form.is_lora and not p.form.is_nothing]
    if not point.form.is_lora or not others:
        return Choice(point.form, None)
    return Choice(point.form, min(others, key=lambda p: (p.loss + price * p.parameters, p.form.order)).form)
