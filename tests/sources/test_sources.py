"""Paths and Hub ids, and the errors when neither can be resolved."""

import pytest

from krona_hub.errors import IntegrityError, NotFoundError, OfflineError
from krona_hub.sources import HubId, is_remote, parse_hub_id, resolve, resolve_base
from tests.hub.fixtures import client_home, hub, no_waiting

__all__ = ["client_home", "hub", "no_waiting"]


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
        ("https://huggingface.co/ns/name/blob/v1/x.safetensors", HubId("ns/name", "v1", "x.safetensors")),
        ("https://hf.co/ns/name", HubId("ns/name", None, None)),
        ("https://civitai.com/models/123", None),
        ("https://huggingface.co.evil.org/ns/name", None),
        ("/abs/file", None),
        ("name", None),
    ],
)
def test_hub_ids_are_read(text, expected):
    assert parse_hub_id(text) == expected


def test_a_page_is_one_of_the_hub_that_is_asked(monkeypatch):
    page, found = "http://hub.studio.org:8080/ns/name", HubId("ns/name", None, None)
    assert parse_hub_id(page) is None and parse_hub_id(page, "http://hub.studio.org:8080/") == found
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.studio.org:8080")
    assert parse_hub_id(page) == found


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
    "text_encoder/../../escaped.json",
)  # fmt: skip
COMPONENTS = {
    "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/merges.txt"
}  # fmt: skip


@pytest.fixture
def pipeline(hub):
    """A hub with one pipeline, tagged v1."""
    repo = hub.state.create("ben/name", files={name: name.encode() * 9 for name in PIPELINE})
    repo.tags["v1"] = repo.head().sha
    return hub


def below(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_of_a_pipeline_on_the_hub_its_components_are_downloaded_and_no_pickle(pipeline):
    folder = resolve_base("ben/name@v1")
    assert below(folder) == COMPONENTS
    assert (folder / "unet/config.json").read_bytes() == b"unet/config.json" * 9


def test_a_component_of_a_repository_is_a_base_too(pipeline):
    folder = resolve_base("ben/name/unet")
    assert folder.name == "unet" and below(folder) == {"config.json", "diffusion_pytorch_model.safetensors"}
    with pytest.raises(NotFoundError, match="no safetensors files in vae"):
        resolve_base("ben/name/vae")


def test_a_base_that_is_in_the_cache_needs_no_network_and_is_not_hashed_again(pipeline, monkeypatch):
    folder = resolve_base("ben/name")
    monkeypatch.setattr("krona_hub.sources.download.file_sha256", lambda path: pytest.fail(f"{path} is read again"))
    pipeline.log.clear()
    assert resolve_base("ben/name") == folder
    assert [r.method for r in pipeline.log] == ["GET"], "where it stands is asked, and nothing else"
    pipeline.stop()
    assert resolve_base("ben/name") == folder and below(folder) == COMPONENTS
    with pytest.raises(OfflineError, match="cannot be reached"):
        resolve_base("ben/other")


def test_weights_of_a_base_that_arrive_damaged_are_downloaded_again_or_refused(pipeline):
    from tests.hub.loopback.server import flipped

    once = pipeline.change("^GET /blobs/", flipped)
    folder = resolve_base("ben/name@v1")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    assert once.seen and weights.read_bytes() == b"unet/diffusion_pytorch_model.safetensors" * 9
    pipeline.state.put("ben/name", {"unet/diffusion_pytorch_model.safetensors": b"others"})
    pipeline.change("^GET /blobs/", flipped, times=9)
    with pytest.raises(IntegrityError, match="differs from the file on the Hub"):
        resolve_base("ben/name")


def test_a_path_is_no_hub_id_of_a_base(tmp_path):
    assert resolve_base(tmp_path) == tmp_path and resolve_base("sdxl").name == "sdxl"
