"""What is in a picture? Shape, colour and place, measured without any learned model, and without the prompt.

Objects are vivid and their surroundings muted, so saturation finds the object; its hue names the colour, its middle
the place; the shape is that of the nearest of a few thousand rendered templates, compared at equal size and place.
A picture without one clear object has no shape and no colour: it counts as wrong, never as a lucky guess.
"""

from __future__ import annotations

from collections import deque
from functools import cache
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scripts.tiny_scenes.render import Image, render
from scripts.tiny_scenes.scene import COLOURS, HUES, POSITIONS, Scene, scenes

VIVID = 0.62  # saturation between that of rooms and that of objects
SMALLEST, LARGEST = 40, 1500  # pixels of an object
WHOLE = 0.75  # share of all vivid pixels that the one object must hold
PATCH = 16  # side of a shape's normalised picture
TEMPLATES, SEED = 1200, 77
FARTHEST = 0.15  # distance from every template at which a thing has no shape that we know
THIRDS = (25.0, 38.0)  # columns that part left, middle and right


class Seen(NamedTuple):
    """What the check finds; None where it finds nothing sure."""

    shape: str | None
    colour: str | None
    position: str | None

    def agrees(self, scene: Scene) -> tuple[bool, bool, bool]:
        return (self.shape == scene.shape, self.colour == scene.colour, self.position == scene.position)


class Score(NamedTuple):
    """Shares of pictures in which the check finds what the words say."""

    shape: float
    colour: float
    position: float
    count: int


NOTHING = Seen(None, None, None)


def look(picture: Image) -> Seen:
    """Shape, colour and place of the one object in a picture."""
    mask = find(picture)
    if mask is None:
        return NOTHING
    return Seen(_shape(picture, mask), _colour(picture, mask), _position(mask))


def score(pictures: list[Image], wanted: list[Scene]) -> Score:
    """How often the pictures show what their scenes say."""
    found = np.array([look(picture).agrees(scene) for picture, scene in zip(pictures, wanted, strict=True)])
    return Score(*(float(share) for share in found.mean(0)), len(wanted))


def find(picture: Image) -> NDArray[np.bool_] | None:
    """The object's pixels, holes left open: the largest vivid patch, if it is of an object's size and nearly alone."""
    x = picture.astype(np.float32)
    high, low = x.max(2), x.min(2)
    vivid = ((high - low) / np.maximum(high, 1) > VIVID) & (high > 50)
    patch = _largest(vivid)
    fits = SMALLEST <= patch.sum() <= LARGEST and patch.sum() >= WHOLE * vivid.sum()
    return patch if fits else None


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest connected patch (by edges and corners)."""
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
            spot = (max(0, y - 1) + int(dy), max(0, x - 1) + int(dx))
            patch[spot] = True
            queue.append(spot)
    return patch


def _colour(picture: Image, mask: NDArray[np.bool_]) -> str | None:
    """The colour word whose hue is nearest to the object's mean hue; None where the object is of many hues."""
    turns = np.exp(1j * np.deg2rad(hues(picture[mask])))
    mean = turns.mean()
    if abs(mean) < 0.9:
        return None
    apart = [abs(np.angle(mean / np.exp(1j * np.deg2rad(HUES[c])))) for c in COLOURS]
    return COLOURS[int(np.argmin(apart))]


def hues(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Degrees, of (n, 3) vivid bytes."""
    r, g, b = pixels.astype(np.float32).T
    return np.rad2deg(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b))


def _position(mask: NDArray[np.bool_]) -> str:
    columns = np.flatnonzero(mask.any(0))
    middle = (columns[0] + columns[-1]) / 2
    return list(POSITIONS)[int(np.searchsorted(THIRDS, middle))]


def _shape(picture: Image, mask: NDArray[np.bool_]) -> str | None:
    outlines, names = _templates()
    apart = ((outlines - _outline(picture, mask)) ** 2).sum(1)
    nearest = np.argsort(apart)[:5]
    if apart[nearest[0]] > FARTHEST:
        return None
    votes = [names[n] for n in nearest]
    return max(votes, key=votes.count)


def _outline(picture: Image, mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The object cut out, brought to equal size, as silhouette and relative brightness: a vector of length 1."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    side = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    middle = (rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2
    steps = (np.arange(PATCH) + 0.5) / PATCH - 0.5
    y, x = (_pick(m + steps * side) for m in middle)
    bright = picture.max(2) * mask
    shade = bright / bright[mask].mean()
    patch = np.concatenate([_sample(mask.astype(np.float32), y, x).ravel(), 0.5 * _sample(shade, y, x).ravel()])
    return (patch / np.linalg.norm(patch)).astype(np.float32)


def _pick(at: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(at, 0, 63)


def _sample(x: NDArray[np.float32], rows: NDArray[np.float64], columns: NDArray[np.float64]) -> NDArray[np.float32]:
    """Bilinear samples on a grid of rows and columns."""
    r, c = np.minimum(rows.astype(int), 62), np.minimum(columns.astype(int), 62)
    fr, fc = (rows - r)[:, None], (columns - c)[None]
    top = x[r][:, c] * (1 - fc) + x[r][:, c + 1] * fc
    low = x[r + 1][:, c] * (1 - fc) + x[r + 1][:, c + 1] * fc
    return top * (1 - fr) + low * fr


@cache
def _templates() -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """Outlines of rendered objects, (n, 2·16·16), and their shapes."""
    drawn = [(scene, render(scene)) for scene in islice(scenes(SEED, held=None), TEMPLATES)]
    found = [(scene.shape, picture, mask) for scene, picture in drawn if (mask := find(picture)) is not None]
    return np.stack([_outline(picture, mask) for _, picture, mask in found]), tuple(shape for shape, _, _ in found)
