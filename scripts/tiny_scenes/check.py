"""Recognize shape, color and position of the object in an image, without a learned model and without the prompt.

Objects are vivid and their surroundings muted, so saturation finds the object. Its hue gives the color, its center the
position; the shape is that of the nearest rendered template, compared at equal size and position. An image without a
clear object has no shape and no color: it counts as wrong, never as a lucky guess.
"""

from __future__ import annotations

from collections import deque
from functools import cache
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scripts.tiny_scenes.render import Image, render
from scripts.tiny_scenes.scene import COLORS, HUES, POSITIONS, Scene, scenes

VIVID = 0.62  # saturation between that of rooms and that of objects
SMALLEST, LARGEST = 40, 1500  # pixels of an object
WHOLE = 0.75  # minimum share of all vivid pixels that belong to the object
PATCH = 16  # side of the normalized image of a shape, in pixels
TEMPLATES, SEED = 1200, 77
FARTHEST = 0.15  # distance from all templates above which the shape is unknown
THIRDS = (25.0, 38.0)  # columns that separate left, middle and right


class Seen(NamedTuple):
    """The result of the check; None for uncertain properties."""

    shape: str | None
    color: str | None
    position: str | None

    def agrees(self, scene: Scene) -> tuple[bool, bool, bool]:
        return (self.shape == scene.shape, self.color == scene.color, self.position == scene.position)


class Score(NamedTuple):
    """Shares of images in which the check finds the properties of the scene."""

    shape: float
    color: float
    position: float
    count: int


NOTHING = Seen(None, None, None)


def look(image: Image) -> Seen:
    """Return shape, color and position of the object in an image."""
    mask = find(image)
    if mask is None:
        return NOTHING
    return Seen(_shape(image, mask), _color(image, mask), _position(mask))


def score(images: list[Image], wanted: list[Scene]) -> Score:
    """Return the shares of images that match their scenes."""
    found = np.array([look(image).agrees(scene) for image, scene in zip(images, wanted, strict=True)])
    return Score(*(float(share) for share in found.mean(0)), len(wanted))


def find(image: Image) -> NDArray[np.bool_] | None:
    """Return the pixels of the object: the largest vivid patch, if its size fits an object and little else is vivid."""
    x = image.astype(np.float32)
    high, low = x.max(2), x.min(2)
    vivid = ((high - low) / np.maximum(high, 1) > VIVID) & (high > 50)
    patch = _largest(vivid)
    fits = SMALLEST <= patch.sum() <= LARGEST and patch.sum() >= WHOLE * vivid.sum()
    return patch if fits else None


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the largest connected patch (by edges and corners)."""
    best, left = np.zeros_like(mask), mask.copy()
    while left.sum() > best.sum():
        patch = _flood(left, *np.argwhere(left)[0])
        left &= ~patch
        best = max(best, patch, key=np.sum)
    return best


def _flood(mask: NDArray[np.bool_], row: int, column: int) -> NDArray[np.bool_]:
    patch, queue = np.zeros_like(mask), deque([(row, column)])
    patch[row, column] = True
    while queue:
        y, x = queue.popleft()
        block = np.s_[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        for dy, dx in np.argwhere(mask[block] & ~patch[block]):
            neighbor = (max(0, y - 1) + int(dy), max(0, x - 1) + int(dx))
            patch[neighbor] = True
            queue.append(neighbor)
    return patch


def _color(image: Image, mask: NDArray[np.bool_]) -> str | None:
    """Return the color name nearest to the mean hue of the object, or None if its hues differ too much."""
    directions = np.exp(1j * np.deg2rad(hues(image[mask])))
    mean = directions.mean()
    if abs(mean) < 0.9:
        return None
    distances = [abs(np.angle(mean / np.exp(1j * np.deg2rad(HUES[c])))) for c in COLORS]
    return COLORS[int(np.argmin(distances))]


def hues(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the hues of (n, 3) vivid bytes, in degrees."""
    r, g, b = pixels.astype(np.float32).T
    return np.rad2deg(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b))


def _position(mask: NDArray[np.bool_]) -> str:
    columns = np.flatnonzero(mask.any(0))
    middle = (columns[0] + columns[-1]) / 2
    return list(POSITIONS)[int(np.searchsorted(THIRDS, middle))]


def _shape(image: Image, mask: NDArray[np.bool_]) -> str | None:
    outlines, names = _templates()
    distances = ((outlines - _outline(image, mask)) ** 2).sum(1)
    nearest = np.argsort(distances)[:5]
    if distances[nearest[0]] > FARTHEST:
        return None
    votes = [names[n] for n in nearest]
    return max(votes, key=votes.count)


def _outline(image: Image, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return silhouette and relative brightness of the object, cropped and resized, as a unit vector."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    side = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    middle = (rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2
    steps = (np.arange(PATCH) + 0.5) / PATCH - 0.5
    y, x = (_clipped(m + steps * side) for m in middle)
    bright = image.max(2) * mask
    shade = bright / bright[mask].mean()
    patch = np.concatenate([_sample(mask.astype(np.float32), y, x).ravel(), 0.5 * _sample(shade, y, x).ravel()])
    return (patch / np.linalg.norm(patch)).astype(np.float32)


def _clipped(at: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(at, 0, 63)


def _sample(x: NDArray[np.float32], rows: NDArray[np.float64], columns: NDArray[np.float64]) -> NDArray[np.float32]:
    """Sample bilinearly on a grid of rows and columns."""
    r, c = np.minimum(rows.astype(int), 62), np.minimum(columns.astype(int), 62)
    fr, fc = (rows - r)[:, None], (columns - c)[None]
    top = x[r][:, c] * (1 - fc) + x[r][:, c + 1] * fc
    low = x[r + 1][:, c] * (1 - fc) + x[r + 1][:, c + 1] * fc
    return top * (1 - fr) + low * fr


@cache
def _templates() -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Return the outlines of rendered objects, (n, 2·16·16), and their shapes."""
    rendered = [(scene, render(scene)) for scene in islice(scenes(SEED, held=None), TEMPLATES)]
    found = [(scene.shape, image, mask) for scene, image in rendered if (mask := find(image)) is not None]
    return np.stack([_outline(image, mask) for _, image, mask in found]), tuple(shape for shape, _, _ in found)
