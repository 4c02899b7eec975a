"""Paths, Hub ids, and what is said when neither leads anywhere."""

import pytest

from krona_hub.errors import NotFoundError, OfflineError
from krona_hub.sources import HubId, is_remote, parse_hub_id, resolve


def test_an_existing_path_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ns").mkdir()
    (tmp_path / "ns" / "name").write_bytes(b"x")
    assert str(resolve("ns/name")) == "ns/name"
    assert not is_remote("ns/name")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ns/name", HubId("ns/name", None, None)),
        ("hf://ns/name@v1.0", HubId("ns/name", "v1.0", None)),
        ("ns/name@main/sub/x.safetensors", HubId("ns/name", "main", "sub/x.safetensors")),
        ("/abs/file", None),
        ("name", None),
    ],
)
def test_hub_ids_are_read(text, expected):
    assert parse_hub_id(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("ns/name", True), ("hf://ns/x.safetensors", True), ("ns/name/x.safetensors", True), ("no/x.safetensors", False),
     ("x.safetensors", False), ("/ns/name", False)],
)  # fmt: skip
def test_what_would_be_asked_of_the_hub_is_known_before(text, expected):
    assert is_remote(text) == expected


def test_a_misspelt_file_names_its_neighbour(tmp_path):
    (tmp_path / "style.safetensors").write_bytes(b"x")
    with pytest.raises(NotFoundError, match=r"Did you mean .*style\.safetensors"):
        resolve(tmp_path / "stile.safetensors")


def test_without_a_network_a_hub_id_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineError, match="no such local path"):
        resolve("nobody/nothing-at-all")
