"""Paths, Hub ids, and what is said when neither leads anywhere."""

import pytest
from huggingface_hub.utils import httpx

from krona_hub.errors import NotFoundError, OfflineError
from krona_hub.sources import HubId, is_remote, parse_hub_id, resolve, resolve_base


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


PIPELINE = (
    "model_index.json", "README.md", "sd15.safetensors", "sd15.ckpt", "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin", "tokenizer/merges.txt",
)  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub of one repository; what was downloaded of it is collected."""
    asked = {}

    def download(repo, *, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, files=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: list(PIPELINE))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


def test_of_a_pipeline_on_the_hub_its_components_are_downloaded_and_no_pickle(hub, tmp_path):
    assert resolve_base("ns/name@v1") == tmp_path
    assert hub["repo"] == "ns/name" and hub["revision"] == "v1"
    assert hub["files"] == [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/merges.txt"
    ]  # fmt: skip


def test_a_component_of_a_repository_is_a_base_too(hub, tmp_path):
    assert resolve_base("ns/name/unet") == tmp_path / "unet"
    assert hub["files"] == ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    with pytest.raises(NotFoundError, match="no safetensors in vae"):
        resolve_base("ns/name/vae")


def test_a_base_that_is_in_the_cache_needs_no_network(hub, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise httpx.ConnectError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", unreachable)
    assert resolve_base("ns/name") == tmp_path and "*.safetensors" in hub["files"] and "*.ckpt" not in hub["files"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(OfflineError, match="cannot be reached"):
        resolve_base("ns/name")


def test_a_path_is_no_hub_id_of_a_base(tmp_path):
    assert resolve_base(tmp_path) == tmp_path and resolve_base("sdxl").name == "sdxl"
