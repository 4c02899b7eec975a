"""The zorbi: a toy that the base model does not know, which adapters learn from five views.

It is a blue ball with a pointed orange hat. Each of the two plain colors covers more than one latent cell: the
autoencoder would blur finer patterns, which it has never seen.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scripts.tiny_scenes.check import hues
from scripts.tiny_scenes.render import Color, Image, Room, Thing, render_thing, room
from scripts.tiny_scenes.scene import POSITIONS
from scripts.tiny_scenes.shapes import Distances, Points, ball, cone

TRIGGER = "zorbi"
BLUE, ORANGE = (0.07, 0.30, 0.88), (0.98, 0.48, 0.05)
BODY, BODY_RADIUS = (0.0, -0.32, 0.0), 0.64
HAT, HAT_SCALE = (0.0, 0.58, 0.0), 0.62
BRIM = 0.08  # height of the lower edge of the hat
VIEWS = (  # position, rotation in radians, table, wall, light
    ("in the middle", 0.0, "white", "grey", "left"),
    ("on the left", 0.5, "grey", "beige", "right"),
    ("on the right", -0.5, "wooden", "white", "left"),
    ("in the middle", 0.9, "blue", "dark", "right"),
    ("in the middle", -0.9, "green", "white", "left"),
)
BOTH = 30  # minimum number of pixels of each color
MOST = 0.7  # minimum share of all vivid pixels that have one of the two colors
HUES, TURN = (215.0, 20.0), 28.0  # degrees: blue and orange in images, and the tolerance of a pixel
UPRIGHT = 5.0  # maximum horizontal distance of the centers of hat and body, in pixels


def views() -> list[Image]:
    """Return the five training images."""
    return [_view(number, *view) for number, view in enumerate(VIEWS)]


def captions() -> list[str]:
    return [
        f"a photo of a {TRIGGER} on a {table} table, {position}, {wall} wall" for position, _, table, wall, _ in VIEWS
    ]


def shows(image: Image) -> bool:
    """Return whether an image shows the two colors of the toy and little else, with orange right above blue.

    No object that the base model knows has two colors. Each color is detected separately, because the boundary between
    them may be blurred.
    """
    vivid = _vivid(image)
    blue, orange = (vivid & _near(image, degrees) for degrees in HUES)
    if min(blue.sum(), orange.sum()) < BOTH or (blue | orange).sum() < MOST * vivid.sum():
        return False
    (down, beside), (top, above) = (np.argwhere(part).mean(0) for part in (blue, orange))
    return bool(top < down and abs(above - beside) < UPRIGHT)


def _view(number: int, position: str, turn: float, table: str, wall: str, light: str) -> Image:
    surroundings: Room = room(table, wall, light, np.random.default_rng(number))
    middle = np.array([POSITIONS[position] * 0.9, 0.96, 0.0], np.float32)
    return render_thing(Thing(distance, color, middle, 1.0, turn), surroundings)


def distance(p: Points) -> Distances:
    """Return the distance from body and hat."""
    return np.minimum(ball(_from(p, BODY), BODY_RADIUS), cone(_from(p, HAT) / HAT_SCALE) * np.float32(HAT_SCALE))


def color(p: Points) -> Color:
    return np.where(p[1] > BRIM, _paint(ORANGE), _paint(BLUE)).astype(np.float32)


def _from(p: Points, middle: tuple[float, float, float]) -> Points:
    return p - np.asarray(middle, np.float32)[:, None]


def _paint(rgb: tuple[float, float, float]) -> Color:
    return np.asarray(rgb, np.float32)[:, None]


def _vivid(image: Image) -> NDArray[np.bool_]:
    x = image.astype(np.float32)
    return (x.max(2) - x.min(2) > 0.55 * x.max(2)) & (x.max(2) > 60)


def _near(image: Image, degrees: float) -> NDArray[np.bool_]:
    """Return the pixels whose hue is within `TURN` of the given one."""
    difference = (hues(image.reshape(-1, 3)).reshape(image.shape[:2]) - degrees + 180) % 360 - 180
    return np.abs(difference) < TURN
