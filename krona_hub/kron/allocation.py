"""Allocation of a parameter budget to layers, each with its own list of factorizations.

Greedy: steps down the convex hull of every layer's (size, loss) points, largest gain per parameter first, until nothing
more fits; then the single steps that still fit, largest gain first. A layer may be left out if its list contains a
point of size 0, which is a corner of the hull like any other.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from krona_hub.errors import UsageError, counted
from krona_hub.kron.candidates import Factorization


class Point(NamedTuple):
    """A factorization of one layer, with its size and its loss."""

    parameters: int
    loss: float  # absolute squared error, or another loss that is additive over layers
    form: Factorization


class BudgetError(UsageError):
    """A budget below `least`, the smallest possible one."""

    least = 0


def hull(points: Sequence[Point]) -> list[Point]:
    """Return the lower left convex hull: increasing size, decreasing loss, decreasing gain per parameter."""
    corners: list[Point] = []
    for point in sorted(points, key=lambda p: (p.parameters, p.loss, p.form.order)):
        if corners and point.loss >= corners[-1].loss:
            continue
        while len(corners) > 1 and gain(corners[-2], corners[-1]) <= gain(corners[-1], point):
            corners.pop()
        if corners and corners[-1].parameters == point.parameters:
            corners.pop()
        corners.append(point)
    return corners


def gain(before: Point, after: Point) -> float:
    """Return the reduction of the loss per parameter."""
    return (before.loss - after.loss) / (after.parameters - before.parameters)


def allocate(layers: Sequence[Sequence[Point]], budget: int) -> tuple[list[Point], float]:
    """Return one point per layer, within the budget if the smallest fit, and the gain at which the budget ran out."""
    hulls = [hull(points) for points in layers]
    at, left = [0] * len(hulls), budget - sum(corners[0].parameters for corners in hulls)
    queue = [(-gain(*corners[:2]), i) for i, corners in enumerate(hulls) if len(corners) > 1]
    heapq.heapify(queue)
    price = 0.0
    while queue:
        negative, i = heapq.heappop(queue)
        now, then = hulls[i][at[i] : at[i] + 2]
        if then.parameters - now.parameters > left:
            price = price or -negative
            continue
        left -= then.parameters - now.parameters
        at[i] += 1
        if at[i] + 1 < len(hulls[i]):
            heapq.heappush(queue, (-gain(*hulls[i][at[i] : at[i] + 2]), i))
    chosen = [corners[k] for corners, k in zip(hulls, at, strict=True)]
    return _filled(layers, chosen, left), price


def spend(layers: Sequence[Sequence[Point]], budget: int) -> tuple[list[Point], float]:
    """Return what `allocate` returns, with at least one layer in the result: a file without any is not an adapter.

    Raises BudgetError, naming the smallest possible budget, if the layers without a point of size 0 exceed the budget,
    or if all layers have one and the budget holds no other point.

    >>> from krona_hub.kron.candidates import Factorization, nothing
    >>> from krona_hub.kron.shapes import KronShape
    >>> rank_1 = Factorization(KronShape(1, 1, 4, 6), 1, 1, 10, 0.0)
    >>> layers = [[Point(0, energy, nothing((4, 6))), Point(10, 0.0, rank_1)] for energy in (1.0, 5.0)]
    >>> [str(point.form) for point in spend(layers, 15)[0]]
    ['left out', 'LoRA of rank 1']
    """
    least, required = smallest_budget(layers)
    if least > budget:
        held = f"{counted(required, 'layer')} that cannot be left out" if required else "any layer"
        of = "the smallest factorization" if required < 2 else "their smallest factorizations"
        error = BudgetError(
            f"a budget of {counted(budget, 'parameter')} is too small for {held}.",
            fix=f"Choose at least {least}, the size of {of}.",
        )
        error.least = least
        raise error
    chosen, price = allocate(layers, budget)
    return chosen if any(point.parameters for point in chosen) else _with_one(layers, chosen, budget), price


def smallest_budget(layers: Sequence[Sequence[Point]]) -> tuple[int, int]:
    """Return the smallest budget of `spend`, and how many layers without a point of size 0 it is for."""
    sizes = [min(point.parameters for point in points) for points in layers]
    if any(sizes):
        return sum(sizes), sum(size > 0 for size in sizes)
    return min((point.parameters for points in layers for point in points if point.parameters), default=0), 0


def _with_one(layers: Sequence[Sequence[Point]], chosen: list[Point], budget: int) -> list[Point]:
    """Keep the layer that loses least by it, in its smallest form, where no step reduces the loss: zero deltas."""
    fits = [(i, point) for i, points in enumerate(layers) for point in points if 0 < point.parameters <= budget]
    i, kept = min(fits, key=lambda x: (x[1].loss - chosen[x[0]].loss, x[1].parameters, x[0]), default=(0, None))
    return chosen if kept is None else [*chosen[:i], kept, *chosen[i + 1 :]]


def _filled(layers: Sequence[Sequence[Point]], chosen: list[Point], left: int) -> list[Point]:
    """Take single steps to any points, on the hull or not, largest saving first, while they fit."""
    chosen = list(chosen)
    while True:
        best = None
        for i, points in enumerate(layers):
            for point in points:
                saved = chosen[i].loss - point.loss
                if point.parameters - chosen[i].parameters <= left and saved > 0 and (best is None or saved > best[0]):
                    best = saved, i, point
        if best is None:
            return chosen
        _, i, point = best
        left -= point.parameters - chosen[i].parameters
        chosen[i] = point
