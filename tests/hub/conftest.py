"""The loopback hub and a small adapter; nothing here, and nothing in the client, waits between two tries."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from krona_hub.assets import __file__ as assets
from tests.hub.loopback.server import Loopback


@pytest.fixture
def client_home(tmp_path, monkeypatch) -> Path:
    """The client as on a new machine of Ana, who is logged in; LFS is its way to send."""
    home = tmp_path / "hf-home"
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    for name, value in {
        "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"), "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True, "HF_HUB_OFFLINE": False,
    }.items():  # fmt: skip
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    return home


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr("krona_hub.sources.retry.sleep", lambda _: None)


@pytest.fixture
def hub(client_home, no_waiting, monkeypatch):
    with Loopback() as loopback:
        monkeypatch.setenv("HF_ENDPOINT", loopback.url)
        yield loopback


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A folder with `style.safetensors` (native, from a LoKr) and `other.safetensors`, the same a little weaker."""
    from dataclasses import replace

    from krona_hub.formats.files import read
    from krona_hub.formats.writing import write

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
