"""Bases and pictures that the trainings of these tests share."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.training.bases import save_base


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Kind -> folder of a tiny pipeline, built when it is first asked for."""
    place, made = tmp_path_factory.mktemp("bases"), {}

    def base(kind: str) -> str:
        if kind not in made:
            made[kind] = str(save_base(kind, place))
        return made[kind]

    return base


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Five pictures of three proportions."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(5)
    for number, size in enumerate([(40, 40), (40, 40), (60, 36), (36, 60), (44, 40)]):
        pixels = random.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return str(folder)


@pytest.fixture
def quick(bases, photos, tmp_path):
    """Settings of a training that takes a second."""
    return {
        "base": bases("sd15"), "data": photos, "prompt": "a photo", "resolution": 16, "steps": 4, "device": "cpu",
        "output": str(tmp_path / "run"),
    }  # fmt: skip
