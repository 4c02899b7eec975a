"""Which Kronecker form each layer of a LoRA should take: the smallest within an error, or the best for a budget.

The family of forms is that of `forms.py`: every divisor shape, every number of terms, right factors dense or of one
rank; the LoRA itself, whole or truncated, is always among them. The result is that of computing them all, which
`pruning.py` avoids.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.aliases import Progress
from krona_hub.errors import InexpressibleError, UsageError
from krona_hub.kron.allocation import Point, allocate
from krona_hub.kron.best_first import Allowed, Goal, Search
from krona_hub.kron.candidates import ROUNDING, Factorization, is_lora, most_right_rank, parameters_of, realise
from krona_hub.kron.parallel import in_processes
from krona_hub.kron.rearrangement import LoraSvd
from krona_hub.kron.shapes import KronShape, choices, divisors, split

__all__ = ["Choice", "Factorization", "error_of", "frontier", "realise", "smallest_within", "within_budget"]

TOGETHER = 24  # layers searched at once: more share products, fewer share memory
ROUNDS = 3  # looks at the price of a parameter, each with all forms found so far
LADDER = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.02, 0.01)  # errors that a frontier is shown at

Pair = tuple[Tensor, Tensor]  # up (out, r), down (r, in)


class Choice(NamedTuple):
    form: Factorization
    best_other: Factorization | None  # where the LoRA itself wins: the best form that is not the LoRA


def smallest_within(
    loras: Sequence[Pair],
    max_error: float,
    *,
    allowed: Allowed | None = None,
    others_within: float = inf,
    progress: Progress | None = None,
) -> list[Choice]:
    """Per layer, the form with the fewest parameters whose relative error is at most `max_error`.

    `allowed(shape, terms, right_rank)` says which forms may be used. At equal size the LoRA itself is preferred,
    then fewer terms. Where the LoRA itself is near enough, other forms are looked for up to `others_within` times
    its size: the search among few allowed forms is long where none is small. An error below 1e-12 counts as none.
    Raises UsageError for a negative error, InexpressibleError where no allowed form is near enough.

    >>> up, down = torch.kron(torch.eye(4), torch.ones(6, 1)), torch.kron(torch.eye(4), torch.ones(1, 6))
    >>> form = smallest_within([(up, down)], 0.01)[0].form
    >>> str(form), form.parameters
    ('1 × 4x4 ⊗ 6x6, B of rank 1', 28)
    """
    if not max_error >= 0:
        raise UsageError(f"an error of {max_error} cannot be kept.", fix="Choose an error of 0 or more.")

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
    """The relative error of the nearest sum of `terms` products of one shape."""
    full = split((up.shape[0], down.shape[1]), shape[0], shape[1])
    return realise(up, down, Factorization(full, terms, None, parameters_of(full, terms, None), 0.0)).relative_error


def frontier(
    up: Tensor, down: Tensor, errors: Sequence[float] = LADDER, *, allowed: Allowed | None = None
) -> list[Factorization]:
    """The smallest form within each of `errors`, without repetition and with growing size."""
    found = {smallest_within([(up, down)], e, allowed=allowed)[0].form for e in errors}
    return sorted(found, key=lambda form: form.order)


# --- layers of one size together -------------------------------------------------------------------------------------


class _Group(NamedTuple):
    """Some layers of one size."""

    members: list[int]  # their places in the list
    lora: LoraSvd  # of unit norm, but for those that are zero
    norms: Tensor  # (n,)


def _batches(loras: Sequence[Pair]) -> list[list[int]]:
    """The places of layers of one size and rank, TOGETHER at a time."""
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
            f"no form that is allowed comes within an error of {max_error:g}.",
            fix="Allow a larger error, or a format that holds the LoRA itself.",
        )
    return Choice(other, None)


def _lora_forms(s: Tensor, size: tuple[int, int], allowed: Allowed | None) -> Iterator[Factorization]:
    """The truncated LoRAs of one layer in every writing that is allowed, by rank."""
    left = s.square().flip(0).cumsum(0).flip(0).sqrt() / s.norm().clamp(min=1e-300)
    for rank in range(1, len(s) + 1):
        error = float(left[rank]) if rank < len(s) else 0.0
        for shape, terms, right in _writings(size, rank):
            if allowed is None or allowed(shape, terms, right):
                yield Factorization(shape, terms, right, rank * sum(size), error)
                break


def _writings(size: tuple[int, int], rank: int) -> Iterator[tuple[KronShape, int, int | None]]:
    out, in_ = size
    yield KronShape(1, 1, out, in_), 1, rank
    yield KronShape(out, 1, 1, in_), rank, None
    yield KronShape(1, in_, out, 1), rank, None


def _smallest_lora(s: Tensor, size: tuple[int, int], max_error: float, allowed: Allowed | None) -> Factorization | None:
    return next((f for f in _lora_forms(s, size, allowed) if f.relative_error <= max(max_error, ROUNDING)), None)


def _roof(lora: LoraSvd, allowed: Allowed | None) -> Tensor:
    """A size that some form other than the LoRA certainly needs no more than, for every layer."""
    sizes = [parameters_of(*form) for form in _exact_forms(lora) if allowed is None or allowed(*form)]
    return torch.full((len(lora.s),), float(min(sizes, default=torch.inf)), dtype=torch.float64)


def _exact_forms(lora: LoraSvd) -> Iterator[tuple[KronShape, int, int | None]]:
    """Forms that hold any LoRA of this rank: the matrix itself, and LoRAs side by side or one above the other."""
    (out, in_), rank = lora.size, lora.s.shape[1]
    yield KronShape(1, 1, out, in_), 1, None
    for p in divisors(out)[1:2]:
        stacked = KronShape(p, 1, out // p, in_)
        yield stacked, p, rank if rank <= most_right_rank(stacked) else None
    for p in divisors(in_)[1:2]:
        abreast = KronShape(1, p, out, in_ // p)
        yield abreast, p, rank if rank <= most_right_rank(abreast) else None


def _smallest_form(size: tuple[int, int], allowed: Allowed | None, error: float) -> Factorization | None:
    """The smallest form of all that is not a LoRA, whatever it keeps."""
    forms = (
        Factorization(shape, 1, rank, parameters_of(shape, 1, rank), error)
        for shape in choices(*size)
        for rank in ([None, 1] if most_right_rank(shape) else [None])
        if not is_lora(shape, rank) and (allowed is None or allowed(shape, 1, rank))
    )
    return min(forms, key=lambda form: form.order, default=None)


# --- a budget --------------------------------------------------------------------------------------------------------


def within_budget(
    loras: Sequence[Pair], parameters: int, *, allowed: Allowed | None = None, progress: Progress | None = None
) -> list[Choice]:
    """The forms of all layers together with the least total squared error for at most `parameters` numbers.

    The budget goes where a parameter gains most: down the convex hull of each layer's (size, squared error) points,
    then to whatever still fits. Raises UsageError where the smallest forms of all layers exceed the budget.
    """
    _check_budget(parameters)
    groups = [_group(loras, members) for members in _batches(loras)]
    points = _first_points(loras, groups, allowed)
    _, price = _allocated(points, parameters)
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
        chosen, before = _allocated(points, parameters), price
        price = chosen[1]
        if abs(price - before) <= 0.05 * before:
            break
    if progress:
        progress(total, total)
    return [_with_other(point, rest, price) for point, rest in zip(chosen[0], points, strict=True)]


def _check_budget(parameters: int) -> None:
    if parameters < 1:
        raise UsageError(f"a budget of {parameters} parameters holds nothing.", fix="Choose 1 or more.")


def _first_points(loras: Sequence[Pair], groups: list[_Group], allowed: Allowed | None) -> list[list[Point]]:
    """Per layer the truncated LoRAs and the smallest form of all."""
    points: list[list[Point]] = [[] for _ in loras]
    for members, lora, norms in groups:
        smallest = _smallest_form(lora.size, allowed, 1.0)
        for i, s, norm in zip(members, lora.s, norms, strict=True):
            energy = float(norm) ** 2
            points[i] += [_point(f, energy) for f in _lora_forms(s, lora.size, allowed)]
            if smallest is not None:
                error = realise(*loras[i], smallest).relative_error
                points[i].append(_point(replace(smallest, relative_error=error), energy))
        if not all(points[i] for i in members):
            raise InexpressibleError("no form is allowed for a layer.", fix="Choose a format that holds more shapes.")
    return points


def _allocated(points: list[list[Point]], parameters: int) -> tuple[list[Point], float]:
    least = sum(min(p.parameters for p in layer) for layer in points)
    if least > parameters:
        raise UsageError(
            f"a budget of {parameters} parameters is too small for {len(points)} layers.",
            fix=f"Their smallest forms take {least}.",
        )
    return allocate(points, parameters)


def _more_points(
    points: list[list[Point]], price: float, allowed: Allowed | None, group: _Group
) -> dict[int, list[Point]]:
    """Per layer every form found on the way to the best one at this price of a parameter."""
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
    """The chosen form and, where it is the LoRA, the other form that is worth most at the final price."""
    others = [p for p in points if not p.form.is_lora]
    if not point.form.is_lora or not others:
        return Choice(point.form, None)
    return Choice(point.form, min(others, key=lambda p: (p.loss + price * p.parameters, p.form.order)).form)
