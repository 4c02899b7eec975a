"""The base that ships is found by its name, from everywhere, and a path comes before the name."""

from pathlib import Path

import pytest

from krona_hub.assets import shipped
from krona_hub.bases.loading import load_base
from krona_hub.sources import resolve_base


@pytest.fixture
def assets(tmp_path, monkeypatch) -> Path:
    """Assets with an empty folder of the base in them."""
    monkeypatch.setattr(shipped, "files", lambda package: tmp_path / "assets")
    (tmp_path / "assets" / "tiny-scenes").mkdir(parents=True)
    return tmp_path / "assets"


def test_the_name_leads_to_the_folder(assets):
    assert shipped.folder_of("tiny-scenes") == resolve_base("Tiny-Scenes") == assets / "tiny-scenes"


def test_a_path_of_that_name_comes_first(assets, tmp_path, monkeypatch):
    (tmp_path / "here" / "tiny-scenes").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert shipped.folder_of("tiny-scenes") == Path("tiny-scenes")


def test_other_names_stay_what_they_are(assets):
    assert shipped.folder_of("sdxl") == Path("sdxl")


def test_its_names_and_shapes_are_known_without_the_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "files", lambda package: tmp_path)
    base = load_base("tiny-scenes")
    assert (base.name, base.family) == ("tiny-scenes", "tiny-scenes")
    assert set(base.components) == {"unet", "text_encoder"}
