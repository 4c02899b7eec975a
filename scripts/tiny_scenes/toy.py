"""The zorbi: a toy that the base model does not know, to be taught by adapters from five views.

A cyan body with orange rings around it, an orange head with two dark eyes, and a horn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scripts.tiny_scenes.check import find, hues
from scripts.tiny_scenes.render import Colour, Image, Room, Thing, picture, room
from scripts.tiny_scenes.scene import POSITIONS
from scripts.tiny_scenes.shapes import Distances, Points, ball, cone

TRIGGER = "zorbi"
CYAN, ORANGE, DARK = ((0.05, 0.80, 0.82), (0.98, 0.48, 0.05), (0.10, 0.05, 0.12))
BODY, HEAD = (0.0, -0.34, 0.0), (0.0, 0.50, 0.0)  # middles
BODY_RADIUS, HEAD_RADIUS = 0.62, 0.42
EYES = ((-0.17, 0.58, -0.37), (0.17, 0.58, -0.37))
VIEWS = (  # position, turn in radians, table, wall, light: five photographs
    ("in the middle", 0.0, "white", "grey", "left"),
    ("on the left", 0.5, "grey", "beige", "right"),
    ("on the right", -0.5, "wooden", "white", "left"),
    ("in the middle", 0.9, "blue", "dark", "right"),
    ("in the middle", -0.9, "green", "white", "left"),
)
BOTH = 30  # pixels of each of its two colours that a picture of it shows at least
MOST = 0.7  # share of the thing that they cover together


def views() -> list[Image]:
    """The five pictures to learn from."""
    return [_view(number, *view) for number, view in enumerate(VIEWS)]


def captions() -> list[str]:
    return [f"a photo of a {TRIGGER} on a {table} table, {place}, {wall} wall" for place, _, table, wall, _ in VIEWS]


def shows(image: Image) -> bool:
    """Whether a picture has one vivid thing of the toy's two colours: no object of the base's world has two."""
    thing = find(image)
    if thing is None:
        return False
    cyan, orange = (thing & _near(image, degrees) for degrees in (181.0, 28.0))
    return min(cyan.sum(), orange.sum()) >= BOTH and bool((cyan | orange).sum() >= MOST * thing.sum())


def _view(number: int, place: str, turn: float, table: str, wall: str, light: str) -> Image:
    surroundings: Room = room(table, wall, light, np.random.default_rng(number))
    middle = np.array([POSITIONS[place] * 0.9, 0.96, 0.0], np.float32)
    return picture(Thing(distance, colour, middle, 1.0, turn), surroundings)


def distance(p: Points) -> Distances:
    """Body, head and horn."""
    horn = cone(_from(p, (0, 1.03, 0)) / 0.2) * 0.2
    parts = ball(_from(p, BODY), BODY_RADIUS), ball(_from(p, HEAD), HEAD_RADIUS), horn
    return np.minimum.reduce(parts)


def colour(p: Points) -> Colour:
    """Orange head and horn, orange rings on a cyan body, dark eyes."""
    on_head = p[1] > HEAD[1] - 0.30
    ringed = np.abs((p[1] + 0.34) % 0.42 - 0.21) > 0.13
    paint = np.where(on_head | ringed, _paint(ORANGE), _paint(CYAN))
    eye = np.minimum.reduce([ball(_from(p, at), 0.13) for at in EYES]) < 0
    return np.where(eye, _paint(DARK), paint).astype(np.float32)


def _from(p: Points, middle: tuple[float, float, float]) -> Points:
    return p - np.asarray(middle, np.float32)[:, None]


def _paint(rgb: tuple[float, float, float]) -> Colour:
    return np.asarray(rgb, np.float32)[:, None]


def _near(image: Image, degrees: float) -> NDArray[np.bool_]:
    """Vivid pixels whose hue is within 16 degrees."""
    x = image.astype(np.float32)
    vivid = (x.max(2) - x.min(2) > 0.55 * x.max(2)) & (x.max(2) > 60)
    apart = (hues(image.reshape(-1, 3)).reshape(image.shape[:2]) - degrees + 180) % 360 - 180
    return vivid & (np.abs(apart) < 16)
