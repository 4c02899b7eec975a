"""A few sizes of about equal area, so that pictures keep their proportions and still make batches. Torch-free."""

from __future__ import annotations

from math import log, sqrt

WIDEST = 2.0  # longest side : shortest side
Size = tuple[int, int]  # (width, height) in pixels


def bucket_sizes(resolution: int, multiple: int, widest: float = WIDEST) -> tuple[Size, ...]:
    """Sizes whose sides are multiples and whose area is at most resolution², widest last; the square is among them.

    >>> bucket_sizes(64, 16)
    ((48, 80), (64, 64), (80, 48))
    """
    side = max(multiple, resolution // multiple * multiple)
    found = {(side, side)}
    width = multiple
    while width <= side * sqrt(widest):
        height = side * side // width // multiple * multiple
        if height and max(width, height) <= widest * min(width, height):
            found |= {(width, height), (height, width)}
        width += multiple
    return tuple(sorted(found, key=lambda s: (s[0] / s[1], s)))


def nearest_bucket(size: Size, sizes: tuple[Size, ...]) -> Size:
    """The bucket whose proportions are nearest, on a logarithmic scale; the larger one of two.

    >>> nearest_bucket((400, 300), bucket_sizes(512, 64))
    (576, 448)
    """
    ratio = log(size[0] / size[1])
    return min(sizes, key=lambda s: (abs(log(s[0] / s[1]) - ratio), -s[0] * s[1]))
