"""Fixtures that tests of other folders use too: a client as on a new machine, and a hub that it talks to."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

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
