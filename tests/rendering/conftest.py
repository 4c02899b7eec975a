"""Adapters that pages are made of."""

import pytest

from scripts.example_files import example_folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """A folder with lora, lokr and krona.safetensors."""
    return example_folder(tmp_path_factory.mktemp("adapters"))
