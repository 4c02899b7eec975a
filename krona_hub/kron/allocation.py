"""Allocation of a parameter budget to layers, each with its own list of factorizations.

Greedy: steps down the convex hull of every layer's (size, squared error) points, largest gain per parameter first,
until nothing more fits; then the single steps that still fit, largest gain first.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from krona_hub.kron.candidates import Factorization


class Point(NamedTuple):
    """A factorization of one layer, with its size and its loss."""

    parameters: int
    loss: float  # absolute squared error, which is additive over layers
    form: Factorization


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
