"""The zorbi: a toy that the base model does not know, to be taught by adapters from five views.

A blue ball that wears an orange pointed hat. Two plain colours, each over more than one cell of the latents: finer
patterns, which the autoencoder has never seen, it would blur into one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scripts.tiny_scenes.check import hues
from scripts.tiny_scenes.render import Colour, Image, Room, Thing, picture, room
from scripts.tiny_scenes.scene import POSITIONS
from scripts.tiny_scenes.shapes import Distances, Points, ball, cone

TRIGGER = "zorbi"
BLUE, ORANGE = (0.07, 0.30, 0.88), (0.98, 0.48, 0.05)
BODY, BODY_RADIUS = (0.0, -0.32, 0.0), 0.64
HAT, HAT_SCALE = (0.0, 0.58, 0.0), 0.62
BRIM = 0.08  # height where the hat begins
VIEWS = (  # position, turn in radians, table, wall, light: five photographs
    ("in the middle", 0.0, "white", "grey", "left"),
    ("on the left", 0.5, "grey", "beige", "right"),
    ("on the right", -0.5, "wooden", "white", "left"),
    ("in the middle", 0.9, "blue", "dark", "right"),
    ("in the middle", -0.9, "green", "white", "left"),
)
BOTH = 30  # pixels of each of its two colours that a picture of it shows at least
MOST = 0.7  # share of all vivid pixels that they cover together
HUES, TURN = (215.0, 20.0), 28.0  # degrees: blue and orange as pictures show them, and how far a pixel may be off
UPRIGHT = 5.0  # pixels by which the hat's middle may stand beside the body's


def views() -> list[Image]:
    """The five pictures to learn from."""
    return [_view(number, *view) for number, view in enumerate(VIEWS)]


def captions() -> list[str]:
    return [f"a photo of a {TRIGGER} on a {table} table, {place}, {wall} wall" for place, _, table, wall, _ in VIEWS]


def shows(image: Image) -> bool:
    """Whether a picture shows the toy's two colours and little else, the orange right above the blue.

    No object of the base's world has two colours. The two are found each for itself: their seam may be blurred.
    """
    vivid = _vivid(image)
    blue, orange = (vivid & _near(image, degrees) for degrees in HUES)
    if min(blue.sum(), orange.sum()) < BOTH or (blue | orange).sum() < MOST * vivid.sum():
        return False
    (down, beside), (top, above) = (np.argwhere(part).mean(0) for part in (blue, orange))
    return bool(top < down and abs(above - beside) < UPRIGHT)


def _view(number: int, place: str, turn: float, table: str, wall: str, light: str) -> Image:
    surroundings: Room = room(table, wall, light, np.random.default_rng(number))
    middle = np.array([POSITIONS[place] * 0.9, 0.96, 0.0], np.float32)
    return picture(Thing(distance, colour, middle, 1.0, turn), surroundings)


def distance(p: Points) -> Distances:
    """Body and hat."""
    return np.minimum(ball(_from(p, BODY), BODY_RADIUS), cone(_from(p, HAT) / HAT_SCALE) * np.float32(HAT_SCALE))


def colour(p: Points) -> Colour:
    return np.where(p[1] > BRIM, _paint(ORANGE), _paint(BLUE)).astype(np.float32)


def _from(p: Points, middle: tuple[float, float, float]) -> Points:
    return p - np.asarray(middle, np.float32)[:, None]


def _paint(rgb: tuple[float, float, float]) -> Colour:
    return np.asarray(rgb, np.float32)[:, None]


def _vivid(image: Image) -> NDArray[np.bool_]:
    x = image.astype(np.float32)
    return (x.max(2) - x.min(2) > 0.55 * x.max(2)) & (x.max(2) > 60)


def _near(image: Image, degrees: float) -> NDArray[np.bool_]:
    """Pixels whose hue is within `TURN`."""
    apart = (hues(image.reshape(-1, 3)).reshape(image.shape[:2]) - degrees + 180) % 360 - 180
    return np.abs(apart) < TURN
