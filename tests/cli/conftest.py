import contextlib

import pytest

from krona_hub.cli.main import main
from scripts.example_files import example_folder
from tests.hub.fixtures import client_home, hub, no_waiting
from tests.training.bases import save_base, save_photos

__all__ = ["adapters", "client_home", "hub", "no_waiting"]


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """A folder with lora, lokr and krona.safetensors, the files of the command examples."""
    return add_training(example_folder(tmp_path_factory.mktemp("adapters")))


def add_training(folder):
    """Add tiny, a trainable pipeline; photos; config.toml; and stopped, a run of two steps."""
    save_base("sd15", folder).rename(folder / "tiny")
    save_photos(folder / "photos")
    (folder / "config.toml").write_text(CONFIG)
    with contextlib.chdir(folder):
        main(["train", "config.toml", "-o", "stopped", "-q"])
    return folder


CONFIG = """base = "tiny"
data = "photos"
prompt = "a photo of sks toy"
output = "run"
steps = 2
resolution = 16
device = "cpu"
"""
