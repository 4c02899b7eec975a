"""Scenes: their vocabulary, random sampling, captions, and the held-out split.

Objects are vivid (saturation above 0.8) and everything around them is muted (below 0.5). `check.py` finds the object
by its saturation, and distinguishes even a blue cube from a blue table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple
from zlib import crc32

import numpy as np

SHAPES = ("cube", "ball", "cone", "cylinder", "ring", "star")
HUES: Mapping[str, float] = {  # degrees
    "red": 0, "orange": 27, "yellow": 54, "green": 125, "cyan": 182, "blue": 224, "purple": 275, "pink": 325,
}  # fmt: skip
BRIGHTNESS: Mapping[str, float] = {"yellow": 0.95, "orange": 0.95, "green": 0.72, "purple": 0.8}  # others: 0.88
COLORS = tuple(HUES)
SIZES: Mapping[str, float] = {"small": 0.6, "large": 0.9}  # half the object's extent, in units of the table
POSITIONS: Mapping[str, float] = {"on the left": -0.8, "in the middle": 0.0, "on the right": 0.8}  # x on the table
TABLES: Mapping[str, tuple[float, float, float]] = {  # sRGB of the plain part of the table
    "white": (0.88, 0.88, 0.86), "grey": (0.52, 0.53, 0.55), "blue": (0.42, 0.50, 0.66), "green": (0.47, 0.60, 0.47),
    "wooden": (0.66, 0.53, 0.40), "tiled": (0.82, 0.82, 0.82),
}  # fmt: skip
WALLS: Mapping[str, tuple[float, float, float]] = {
    "white": (0.93, 0.93, 0.93), "grey": (0.62, 0.63, 0.65), "beige": (0.86, 0.80, 0.69), "dark": (0.24, 0.25, 0.28),
}  # fmt: skip
LIGHTS: Mapping[str, float] = {"left": -1.0, "right": 1.0}  # direction of the light
HELD_OUT = 8  # one in HELD_OUT combinations of shape, color, size and table is never trained on


class Scene(NamedTuple):
    """The content of one image; `seed` determines what the words leave open (exact position, rotation, tint)."""

    shape: str
    color: str
    size: str
    position: str
    table: str
    wall: str
    light: str
    seed: int


class Mentions(NamedTuple):
    """Probability that a training caption names each part; the model is free to choose the parts it omits."""

    size: float = 0.8
    table: float = 0.85
    position: float = 0.75
    wall: float = 0.5
    light: float = 0.3


USUAL = Mentions()


def sample(rng: np.random.Generator) -> Scene:
    """Sample a random scene with every word equally likely."""
    tables = (SHAPES, COLORS, SIZES, POSITIONS, TABLES, WALLS, LIGHTS)
    words = [list(table)[rng.integers(len(table))] for table in tables]
    return Scene(*words, seed=int(rng.integers(2**31)))


def held_out(scene: Scene) -> bool:
    """Return whether no training image shows this combination of shape, color, size and table.

    >>> sum(held_out(s) for s, _ in zip(scenes(seed=0, held=None), range(800))) in range(60, 140)
    True
    """
    return crc32(" ".join((scene.shape, scene.color, scene.size, scene.table)).encode()) % HELD_OUT == 0


def scenes(seed: int, held: bool | None = False) -> Iterator[Scene]:
    """Yield endless random scenes of the training split, the held-out split (`held=True`), or both (None)."""
    rng = np.random.default_rng(seed)
    while True:
        scene = sample(rng)
        if held is None or held_out(scene) == held:
            yield scene


def caption(scene: Scene) -> str:
    """Return the full caption of a scene, in the fixed grammar of the training captions.

    >>> caption(Scene("cube", "red", "small", "on the left", "blue", "grey", "right", 0))
    'a photo of a small red cube on a blue table, on the left, grey wall, light from the right'
    """
    return _sentence(scene, Mentions(1, 1, 1, 1, 1), np.random.default_rng(0), opening="a photo of a")


def prompt(scene: Scene) -> str:
    """Return a typical prompt for a scene, without wall and light.

    >>> prompt(Scene("cube", "red", "small", "on the left", "blue", "grey", "right", 0))
    'a photo of a small red cube on a blue table, on the left'
    """
    return _sentence(scene, Mentions(1, 1, 1, 0, 0), np.random.default_rng(0), opening="a photo of a")


def training_caption(scene: Scene, rng: np.random.Generator, mentions: Mentions = USUAL) -> str:
    """Return a caption that omits parts at random."""
    opening = "a photo of a" if rng.random() < 0.8 else "a"
    return _sentence(scene, mentions, rng, opening)


def _sentence(scene: Scene, mentions: Mentions, rng: np.random.Generator, opening: str) -> str:
    mentioned = Mentions(*(rng.random() < chance for chance in mentions))
    words = [opening, scene.size if mentioned.size else "", scene.color, scene.shape]
    words += [f"on a {scene.table} table"] if mentioned.table else []
    tail = [scene.position] if mentioned.position else []
    tail += [f"{scene.wall} wall"] if mentioned.wall else []
    tail += [f"light from the {scene.light}"] if mentioned.light else []
    return ", ".join([" ".join(word for word in words if word), *tail])


def vocabulary() -> tuple[str, ...]:
    """Return all words of all captions, sorted."""
    parts = (SHAPES, COLORS, SIZES, POSITIONS, TABLES, WALLS, LIGHTS, ("a photo of on table wall light from the",))
    return tuple(sorted({word for part in parts for text in part for word in text.split()}))
