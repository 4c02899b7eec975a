"""A scene becomes a picture: 64×64, ray-marched distance fields in numpy, with shading, shadow and a highlight.

Seeded: an equal scene gives an equal picture. A picture takes about ten milliseconds.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scripts.tiny_scenes import scene as words
from scripts.tiny_scenes.shapes import FACING, FOOT, REACH, SURFACES, Distances, Points

SIDE, SAMPLES = 64, 2  # pixels; rays per pixel and axis
EYE = np.array([0.0, 2.1, -4.6], np.float32)
LOOK_AT = np.array([0.0, 0.55, 0.0], np.float32)
OPENING = 0.38  # half the picture's width at distance 1
WALL_AT = 2.4  # where the table ends
MARCH, SHADOW_MARCH = 26, 14  # steps along a ray

Image = NDArray[np.uint8]  # (64, 64, 3)
Colour = NDArray[np.float32]  # (3,) or (3, n), 0 … 1


class Thing(NamedTuple):
    """An object in its place: a distance field in its own frame, and a colour for each of its points."""

    distance: Callable[[Points], Distances]
    colour: Callable[[Points], Colour]
    middle: NDArray[np.float32]  # (3,) on the table
    scale: float
    turn: float  # radians around the vertical


class Room(NamedTuple):
    table: str
    table_colour: Colour
    wall_colour: Colour
    light: NDArray[np.float32]  # (3,) unit vector towards the light
    brightness: float
    tint: Colour


def render(scene: words.Scene) -> Image:
    """The picture of a scene."""
    rng = np.random.default_rng(scene.seed)
    return picture(_thing(scene, rng), room(scene.table, scene.wall, scene.light, rng))


def picture(thing: Thing, place: Room) -> Image:
    """Any thing in any room: (64, 64, 3) bytes."""
    colour = _background(thing, place)
    rows, points = _hits(thing)
    if rows.size:
        colour[:, rows] = _lit(thing, place, rows, points)
    colour = np.clip(colour * place.brightness * place.tint[:, None], 0, 1)
    fine = colour.reshape(3, SIDE, SAMPLES, SIDE, SAMPLES)
    return np.rint(fine.mean((2, 4)).transpose(1, 2, 0) * 255).astype(np.uint8)


def room(table: str, wall: str, light: str, rng: np.random.Generator) -> Room:
    """A room in these words, with small chance changes of colour and light."""
    towards = np.array([words.LIGHTS[light] * rng.uniform(0.5, 0.9), 1.1, rng.uniform(-0.7, -0.35)], np.float32)
    shift = rng.uniform(-0.03, 0.03, 2)
    return Room(
        table=table,
        table_colour=np.asarray(words.TABLES[table], np.float32) + np.float32(shift[0]),
        wall_colour=np.asarray(words.WALLS[wall], np.float32) + np.float32(shift[1]),
        light=towards / np.linalg.norm(towards),
        brightness=float(rng.uniform(0.88, 1.06)),
        tint=1 + np.float32(rng.uniform(-0.03, 0.03)) * np.array([1, 0, -1], np.float32),
    )


def vivid(colour: str, rng: np.random.Generator) -> Colour:
    """A colour word as sRGB, a little different each time."""
    hue = words.HUES[colour] + rng.uniform(-4, 4)
    value = words.BRIGHTNESS.get(colour, 0.88) * rng.uniform(0.94, 1.04)
    return np.asarray(colorsys.hsv_to_rgb(hue / 360 % 1, rng.uniform(0.88, 0.96), value), np.float32)


def _thing(scene: words.Scene, rng: np.random.Generator) -> Thing:
    scale = words.SIZES[scene.size] * rng.uniform(0.94, 1.06)
    x = words.POSITIONS[scene.position] + rng.uniform(-0.12, 0.12)
    turn = rng.uniform(-1, 1) * FACING.get(scene.shape, np.pi)
    paint = vivid(scene.colour, rng)[:, None]
    middle = np.array([x, -FOOT[scene.shape] * scale, rng.uniform(-0.2, 0.25)], np.float32)
    return Thing(SURFACES[scene.shape], lambda p: paint, middle, scale, turn)


def _camera() -> Points:
    """Unit directions of all rays, (3, n), row by row from the top left."""
    forward = (LOOK_AT - EYE) / np.linalg.norm(LOOK_AT - EYE)
    right = np.array([1, 0, 0], np.float32)
    up = np.cross(forward, right)
    steps = (np.arange(SIDE * SAMPLES, dtype=np.float32) + 0.5) / (SIDE * SAMPLES) * 2 - 1
    y, x = np.meshgrid(-steps * OPENING, steps * OPENING, indexing="ij")
    rays = forward[:, None] + right[:, None] * x.ravel() + up[:, None] * y.ravel()
    return (rays / np.linalg.norm(rays, axis=0)).astype(np.float32)


def _ground() -> tuple[NDArray[np.bool_], Points]:
    """Which rays end on the table (the others on the wall), and where they all end."""
    down = np.minimum(RAYS[1], -1e-4)
    on_table = EYE[1] / -down
    table = EYE[:, None] + RAYS * on_table
    near = (RAYS[1] < 0) & (table[2] < WALL_AT)
    wall = EYE[:, None] + RAYS * ((WALL_AT - EYE[2]) / RAYS[2])
    return near, np.where(near, table, wall).astype(np.float32)


RAYS = _camera()
IS_TABLE, GROUND = _ground()


def _inside(thing: Thing, p: Points) -> Points:
    """World points in the thing's own frame."""
    q = (p - thing.middle[:, None]) / np.float32(thing.scale)
    c, s = np.float32(np.cos(thing.turn)), np.float32(np.sin(thing.turn))
    return np.stack([c * q[0] - s * q[2], q[1], s * q[0] + c * q[2]])


def _field(thing: Thing, p: Points) -> Distances:
    return thing.distance(_inside(thing, p)) * np.float32(thing.scale)


def _passing(thing: Thing, origin: Points, direction: Points) -> tuple[NDArray[np.intp], Distances]:
    """Rays that come near the thing, and how far along them its middle is."""
    to_middle = thing.middle[:, None] - origin
    along = (to_middle * direction).sum(0)
    beside = (to_middle * to_middle).sum(0) - along**2
    return np.flatnonzero((beside < (REACH * thing.scale) ** 2) & (along > 0)), along


def _hits(thing: Thing) -> tuple[NDArray[np.intp], Points]:
    """Rays that meet the thing, and where."""
    rows, along = _passing(thing, EYE[:, None], RAYS)
    rays, far = RAYS[:, rows], along[rows] - np.float32(REACH * thing.scale)
    for _ in range(MARCH):
        far = far + _field(thing, EYE[:, None] + rays * far)
    points = EYE[:, None] + rays * far
    hit = np.abs(_field(thing, points)) < 0.02
    return rows[hit], points[:, hit]


def _normals(thing: Thing, points: Points) -> Points:
    corners = np.array([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]], np.float32)
    slopes = sum(corner[:, None] * _field(thing, points + 0.004 * corner[:, None]) for corner in corners)
    return slopes / np.maximum(np.linalg.norm(slopes, axis=0), 1e-9)


def _lit(thing: Thing, place: Room, rows: NDArray[np.intp], points: Points) -> Colour:
    """Colour of the thing's surface: ambient, from the light, and a small highlight."""
    normals = _normals(thing, points)
    direct = np.maximum((normals * place.light[:, None]).sum(0), 0)
    half = place.light[:, None] - RAYS[:, rows]
    shine = np.maximum((normals * half / np.linalg.norm(half, axis=0)).sum(0), 0) ** 40
    shade = 0.5 + 0.1 * normals[1] + 0.5 * direct
    return thing.colour(_inside(thing, points)) * shade + 0.22 * shine * (direct > 0)


def _background(thing: Thing, place: Room) -> Colour:
    """Table and wall, with the thing's shadow on them."""
    colour = np.where(IS_TABLE, _table(place), _wall(place))
    return colour * _shadow(thing, place) * _contact(thing)


def _table(place: Room) -> Colour:
    base = place.table_colour[:, None]
    x, z = GROUND[0], GROUND[2]
    if place.table == "wooden":
        return base * (1 + 0.12 * np.sin(7 * z + 1.2 * np.sin(1.3 * x)) + 0.04 * np.sin(23 * z + 3 * np.sin(2 * x)))
    if place.table == "tiled":
        return base * np.where((np.floor(x / 0.8) + np.floor(z / 0.8)) % 2 == 0, 1.05, 0.72)
    return np.broadcast_to(base, GROUND.shape) * (1 - 0.05 * z)


def _wall(place: Room) -> Colour:
    return place.wall_colour[:, None] * (0.9 + 0.05 * GROUND[1])


def _shadow(thing: Thing, place: Room) -> Distances:
    """1 in the light, 0.55 in the core of the shadow, soft between."""
    light = np.ones(GROUND.shape[1], np.float32)
    towards = np.broadcast_to(place.light[:, None], GROUND.shape)
    rows, along = _passing(thing, GROUND, towards)
    start, ray = GROUND[:, rows], place.light[:, None]
    far, clear = np.maximum(along[rows] - np.float32(REACH * thing.scale), 0.02), np.ones(rows.size, np.float32)
    for _ in range(SHADOW_MARCH):
        gap = _field(thing, start + ray * far)
        clear = np.minimum(clear, 9 * np.maximum(gap, 0) / np.maximum(far, 0.2))
        far = far + np.clip(gap, 0.03, 0.6)
    light[rows] = 0.55 + 0.45 * clear
    return light


def _contact(thing: Thing) -> Distances:
    """The table is darker right beside the thing."""
    near = np.flatnonzero(((GROUND - thing.middle[:, None]) ** 2).sum(0) < (2 * REACH * thing.scale) ** 2)
    dark = np.ones(GROUND.shape[1], np.float32)
    dark[near] -= 0.35 * np.exp(-np.maximum(_field(thing, GROUND[:, near]), 0) / (0.2 * thing.scale))
    return dark
