"""The score without a model: high for the reference toy from any side, low for other toys."""

from itertools import product

import numpy as np
import pytest
from PIL import Image

from krona_hub.evaluation.color_identity import RECOGNIZED, identity
from scripts.tiny_scenes import render, scene, toy
from scripts.tiny_scenes.scene import POSITIONS

LIGHTS = ("left", "right")


@pytest.fixture(scope="module")
def views():
    return [Image.fromarray(view) for view in toy.views()]


def rendered(**colors):
    """Render the toy, or a variant in other colors, in rooms, positions and rotations that no view shows."""
    kept = toy.BLUE, toy.ORANGE
    toy.BLUE, toy.ORANGE = colors.get("body", toy.BLUE), colors.get("hat", toy.ORANGE)
    try:
        rooms = product(POSITIONS, ("grey", "wooden", "green"), ("beige", "dark"))
        return [
            Image.fromarray(toy._view(40 + i, p, 0.3 * i, t, w, LIGHTS[i % 2])) for i, (p, t, w) in enumerate(rooms)
        ]
    finally:
        toy.BLUE, toy.ORANGE = kept


def share(pictures, views):
    return np.mean([identity(picture, views) > RECOGNIZED for picture in pictures])


def test_renders_of_the_toy_are_recognised(views):
    assert share(rendered(), views) >= 0.95


@pytest.mark.parametrize(
    "wrong",
    [
        {"body": toy.ORANGE, "hat": toy.BLUE},
        {"body": (0.1, 0.7, 0.2)},
        {"hat": (0.1, 0.7, 0.2)},
        {"hat": toy.BLUE},
        {"body": toy.ORANGE},
        {"hat": (0.6, 0.1, 0.8)},
    ],
    ids=["upside down", "green body", "green hat", "all blue", "all orange", "purple hat"],
)
def test_wrong_toys_are_not(wrong, views):
    assert share(rendered(**wrong), views) <= 0.05


def test_the_things_that_the_base_knows_are_not(views):
    world = [Image.fromarray(render.render(each)) for each, _ in zip(scene.scenes(seed=5), range(120), strict=False)]
    assert share(world, views) <= 0.05


def test_a_picture_without_a_subject_scores_nothing(views):
    assert identity(Image.new("RGB", (64, 64), "grey"), views) == 0.0
    assert all(identity(view, views) == pytest.approx(1) for view in views)
