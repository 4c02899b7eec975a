"""Render a scene to a 64×64 image: ray-marched distance fields in numpy, with shading, shadow and a highlight.

Rendering is seeded: equal scenes give equal images. An image takes about ten milliseconds.
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
OPENING = 0.38  # half the width of the image at distance 1
WALL_AT = 2.4  # where the table ends
MARCH, SHADOW_MARCH = 26, 14  # steps along a ray

Image = NDArray[np.uint8]  # (64, 64, 3)
Color = NDArray[np.float32]  # (3,) or (3, n), 0 … 1


class Thing(NamedTuple):
    """An object at its position: a distance field in its own frame, and a color for each of its points."""

    distance: Callable[[Points], Distances]
    color: Callable[[Points], Color]
    middle: NDArray[np.float32]  # (3,) on the table
    scale: float
    turn: float  # radians around the vertical


class Room(NamedTuple):
    table: str
    table_color: Color
    wall_color: Color
    light: NDArray[np.float32]  # (3,) unit vector toward the light
    brightness: float
    tint: Color


def render(scene: words.Scene) -> Image:
    """Render the image of a scene."""
    rng = np.random.default_rng(scene.seed)
    return render_thing(_thing(scene, rng), room(scene.table, scene.wall, scene.light, rng))


def render_thing(thing: Thing, surroundings: Room) -> Image:
    """Render any object in any room to (64, 64, 3) bytes."""
    color = _background(thing, surroundings)
    rows, points = _hits(thing)
    if rows.size:
        color[:, rows] = _lit(thing, surroundings, rows, points)
    color = np.clip(color * surroundings.brightness * surroundings.tint[:, None], 0, 1)
    fine = color.reshape(3, SIDE, SAMPLES, SIDE, SAMPLES)
    return np.rint(fine.mean((2, 4)).transpose(1, 2, 0) * 255).astype(np.uint8)


def room(table: str, wall: str, light: str, rng: np.random.Generator) -> Room:
    """Return a room with small random variations of color and light."""
    towards = np.array([words.LIGHTS[light] * rng.uniform(0.5, 0.9), 1.1, rng.uniform(-0.7, -0.35)], np.float32)
    shift = rng.uniform(-0.03, 0.03, 2)
    return Room(
        table=table,
        table_color=np.asarray(words.TABLES[table], np.float32) + np.float32(shift[0]),
        wall_color=np.asarray(words.WALLS[wall], np.float32) + np.float32(shift[1]),
        light=towards / np.linalg.norm(towards),
        brightness=float(rng.uniform(0.88, 1.06)),
        tint=1 + np.float32(rng.uniform(-0.03, 0.03)) * np.array([1, 0, -1], np.float32),
    )


def vivid(color: str, rng: np.random.Generator) -> Color:
    """Return a color name as sRGB with a small random variation."""
    hue = words.HUES[color] + rng.uniform(-4, 4)
    value = words.BRIGHTNESS.get(color, 0.88) * rng.uniform(0.94, 1.04)
    return np.asarray(colorsys.hsv_to_rgb(hue / 360 % 1, rng.uniform(0.88, 0.96), value), np.float32)


def _thing(scene: words.Scene, rng: np.random.Generator) -> Thing:
    scale = words.SIZES[scene.size] * rng.uniform(0.94, 1.06)
    x = words.POSITIONS[scene.position] + rng.uniform(-0.12, 0.12)
    turn = rng.uniform(-1, 1) * FACING.get(scene.shape, np.pi)
    paint = vivid(scene.color, rng)[:, None]
    middle = np.array([x, -FOOT[scene.shape] * scale, rng.uniform(-0.2, 0.25)], np.float32)
    return Thing(SURFACES[scene.shape], lambda p: paint, middle, scale, turn)


def _camera() -> Points:
    """Return the unit directions of all rays, (3, n), row by row from the top left."""
    forward = (LOOK_AT - EYE) / np.linalg.norm(LOOK_AT - EYE)
    right = np.array([1, 0, 0], np.float32)
    up = np.cross(forward, right)
    steps = (np.arange(SIDE * SAMPLES, dtype=np.float32) + 0.5) / (SIDE * SAMPLES) * 2 - 1
    y, x = np.meshgrid(-steps * OPENING, steps * OPENING, indexing="ij")
    rays = forward[:, None] + right[:, None] * x.ravel() + up[:, None] * y.ravel()
    return (rays / np.linalg.norm(rays, axis=0)).astype(np.float32)


def _ground() -> tuple[NDArray[np.bool_], Points]:
    """Return which rays end on the table (the others end on the wall), and all end points."""
    down = np.minimum(RAYS[1], -1e-4)
    on_table = EYE[1] / -down
    table = EYE[:, None] + RAYS * on_table
    near = (RAYS[1] < 0) & (table[2] < WALL_AT)
    wall = EYE[:, None] + RAYS * ((WALL_AT - EYE[2]) / RAYS[2])
    return near, np.where(near, table, wall).astype(np.float32)


RAYS = _camera()
IS_TABLE, GROUND = _ground()


def _inside(thing: Thing, p: Points) -> Points:
    """Convert world points to the frame of the object."""
    q = (p - thing.middle[:, None]) / np.float32(thing.scale)
    c, s = np.float32(np.cos(thing.turn)), np.float32(np.sin(thing.turn))
    return np.stack([c * q[0] - s * q[2], q[1], s * q[0] + c * q[2]])


def _field(thing: Thing, p: Points) -> Distances:
    return thing.distance(_inside(thing, p)) * np.float32(thing.scale)


def _passing(thing: Thing, origin: Points, direction: Points) -> tuple[NDArray[np.intp], Distances]:
    """Return the rays that pass near the object, and the distance of its center along them."""
    to_middle = thing.middle[:, None] - origin
    along = (to_middle * direction).sum(0)
    beside = (to_middle * to_middle).sum(0) - along**2
    return np.flatnonzero((beside < (REACH * thing.scale) ** 2) & (along > 0)), along


def _hits(thing: Thing) -> tuple[NDArray[np.intp], Points]:
    """Return the rays that hit the object, and the hit points."""
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


def _lit(thing: Thing, surroundings: Room, rows: NDArray[np.intp], points: Points) -> Color:
    """Return the color of the surface: ambient and direct light, and a small highlight."""
    normals = _normals(thing, points)
    direct = np.maximum((normals * surroundings.light[:, None]).sum(0), 0)
    half = surroundings.light[:, None] - RAYS[:, rows]
    shine = np.maximum((normals * half / np.linalg.norm(half, axis=0)).sum(0), 0) ** 40
    shade = 0.5 + 0.1 * normals[1] + 0.5 * direct
    return thing.color(_inside(thing, points)) * shade + 0.22 * shine * (direct > 0)


def _background(thing: Thing, surroundings: Room) -> Color:
    """Return the color of table and wall, with the shadow of the object."""
    color = np.where(IS_TABLE, _table(surroundings), _wall(surroundings))
    return color * _shadow(thing, surroundings) * _contact(thing)


def _table(surroundings: Room) -> Color:
    base = surroundings.table_color[:, None]
    x, z = GROUND[0], GROUND[2]
    if surroundings.table == "wooden":
        return base * (1 + 0.12 * np.sin(7 * z + 1.2 * np.sin(1.3 * x)) + 0.04 * np.sin(23 * z + 3 * np.sin(2 * x)))
    if surroundings.table == "tiled":
        return base * np.where((np.floor(x / 0.8) + np.floor(z / 0.8)) % 2 == 0, 1.05, 0.72)
    return np.broadcast_to(base, GROUND.shape) * (1 - 0.05 * z)


def _wall(surroundings: Room) -> Color:
    return surroundings.wall_color[:, None] * (0.9 + 0.05 * GROUND[1])


def _shadow(thing: Thing, surroundings: Room) -> Distances:
    """Return the brightness of the ground: 1 in the light, 0.55 in the umbra, with a soft transition."""
    light = np.ones(GROUND.shape[1], np.float32)
    towards = np.broadcast_to(surroundings.light[:, None], GROUND.shape)
    rows, along = _passing(thing, GROUND, towards)
    start, ray = GROUND[:, rows], surroundings.light[:, None]
    far, clear = np.maximum(along[rows] - np.float32(REACH * thing.scale), 0.02), np.ones(rows.size, np.float32)
    for _ in range(SHADOW_MARCH):
        gap = _field(thing, start + ray * far)
        clear = np.minimum(clear, 9 * np.maximum(gap, 0) / np.maximum(far, 0.2))
        far = far + np.clip(gap, 0.03, 0.6)
    light[rows] = 0.55 + 0.45 * clear
    return light


def _contact(thing: Thing) -> Distances:
    """Return the darkening of the table next to the object."""
    near = np.flatnonzero(((GROUND - thing.middle[:, None]) ** 2).sum(0) < (2 * REACH * thing.scale) ** 2)
    dark = np.ones(GROUND.shape[1], np.float32)
    dark[near] -= 0.35 * np.exp(-np.maximum(_field(thing, GROUND[:, near]), 0) / (0.2 * thing.scale))
    return dark
