"""Base models and images that the training tests share."""

from __future__ import annotations

import pytest

from tests.training.bases import save_base, save_photos


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Return a function from a kind to the folder of a tiny pipeline, built on first use."""
    root, built = tmp_path_factory.mktemp("bases"), {}

    def base(kind: str) -> str:
        if kind not in built:
            built[kind] = str(save_base(kind, root))
        return built[kind]

    return base


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    return str(save_photos(tmp_path_factory.mktemp("photos") / "toy"))


@pytest.fixture
def quick(bases, photos, tmp_path):
    """Settings of a training run that takes a second."""
    return {
        "base": bases("sd15"), "data": photos, "prompt": "a photo", "resolution": 16, "steps": 4, "device": "cpu",
        "output": str(tmp_path / "run"),
    }  # fmt: skip
