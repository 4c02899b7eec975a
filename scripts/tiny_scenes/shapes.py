"""Signed distances from the surface of each object, negative inside.

Every object fits into a ball of radius `REACH` around its center and stands on the table at y = `FOOT[name]`.
Points are (3, n) arrays in the object's own frame. The formulas are the usual ones of distance-field rendering.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float32]  # (3, n)
Distances = NDArray[np.float32]  # (n,)
REACH = 1.3


def box(p: Points, half: tuple[float, float, float], rounding: float = 0.06) -> Distances:
    q = np.abs(p) - (np.asarray(half, np.float32)[:, None] - rounding)
    outside = np.sqrt((np.maximum(q, 0) ** 2).sum(0))
    return outside + np.minimum(q.max(0), 0) - rounding


def ball(p: Points, radius: float = 0.88) -> Distances:
    return np.sqrt((p * p).sum(0)) - radius


def cylinder(p: Points, radius: float = 0.62, half: float = 0.9, rounding: float = 0.05) -> Distances:
    side = np.hypot(p[0], p[2]) - (radius - rounding)
    end = np.abs(p[1]) - (half - rounding)
    return np.minimum(np.maximum(side, end), 0) + np.hypot(np.maximum(side, 0), np.maximum(end, 0)) - rounding


def cone(p: Points, radius: float = 0.85, half: float = 0.95) -> Distances:
    """Return a lower bound of the distance from a cone with its tip up, which is sufficient for ray marching."""
    slope = np.hypot(2 * half, radius)
    side = (np.hypot(p[0], p[2]) * 2 * half + (p[1] - half) * radius) / slope
    return np.maximum(side, -p[1] - half)


def ring(p: Points, radius: float = 0.66, thickness: float = 0.25) -> Distances:
    """Return the distance from an upright torus that faces the camera."""
    return np.hypot(np.hypot(p[0], p[1]) - radius, p[2]) - thickness


def star(p: Points, radius: float = 1.0, inner: float = 0.45, half: float = 0.26) -> Distances:
    """Return the distance from a five-pointed star cut out of an upright plate."""
    turn, wedge = np.arctan2(p[0], p[1]), 2 * np.pi / 5
    turn = np.abs((turn + wedge / 2) % wedge - wedge / 2)
    away = np.hypot(p[0], p[1])
    x, y = away * np.sin(turn), away * np.cos(turn)
    edge = np.array([inner * np.sin(wedge / 2), inner * np.cos(wedge / 2) - radius])
    normal = np.array([-edge[1], edge[0]]) / np.hypot(*edge)
    outline = x * normal[0] + (y - radius) * normal[1]
    return np.maximum(outline, np.abs(p[2]) - half).astype(np.float32)


SURFACES: Mapping[str, Callable[[Points], Distances]] = {
    "cube": lambda p: box(p, (0.72, 0.72, 0.72)), "ball": ball, "cone": cone, "cylinder": cylinder, "ring": ring,
    "star": star,
}  # fmt: skip
FOOT: Mapping[str, float] = {
    "cube": -0.72, "ball": -0.88, "cone": -0.95, "cylinder": -0.9, "ring": -0.91, "star": -0.81,
}  # fmt: skip
FACING = {
    "ring": 0.6,
    "star": 0.5,
}  # maximum rotation of flat objects away from the camera, in radians; others rotate freely
