"""The loopback hub and a small adapter; nothing here, and nothing in the client, waits between two tries."""

from __future__ import annotations

from pathlib import Path

import pytest

from krona_hub.assets import __file__ as assets
from tests.hub.fixtures import client_home, hub, no_waiting

__all__ = ["client_home", "hub", "no_waiting"]


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A folder with `style.safetensors` (native, from a LoKr) and `other.safetensors`, the same a little weaker."""
    from dataclasses import replace

    from krona_hub.formats.reading.reader import read
    from krona_hub.formats.writing.writer import write

    folder = tmp_path_factory.mktemp("adapters")
    adapter = read(Path(assets).parent / "demo_lokr.safetensors")
    write(adapter, folder / "style.safetensors")
    layers = {
        name: replace(delta, sums=tuple(s.scaled(0.5) for s in delta.sums)) for name, delta in adapter.layers.items()
    }
    write(replace(adapter, layers=layers), folder / "other.safetensors")
    return folder


@pytest.fixture
def style(made) -> Path:
    return made / "style.safetensors"


@pytest.fixture
def other(made) -> Path:
    return made / "other.safetensors"


@pytest.fixture
def pictures(tmp_path) -> Path:
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in (("a cat", "red"), ("dog", "blue")):
        Image.new("RGB", (8, 8), colour).save(folder / f"{name}.png")
    (folder / "dog.txt").write_text("a dog | on <b>grass</b>")
    return folder
