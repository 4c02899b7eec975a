import pytest
import torch

from krona_hub import write
from tests import tiny
from tests.formats import made
from tests.images import whole


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """kind -> diffusers folder of a whole tiny pipeline, made when it is first asked for."""
    made = {}

    def folder(kind: str) -> str:
        if kind not in made:
            made[kind] = str(tmp_path_factory.mktemp("pipelines") / kind)
            getattr(whole, kind)().save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def base(folders):
    return folders("sd15")


@pytest.fixture(scope="session")
def adapter_for(folders, tmp_path_factory):
    """(kind, name, scale) -> a native adapter for projections of every part of that pipeline."""

    def adapter(kind: str, name: str, scale: float) -> str:
        path = tmp_path_factory.mktemp("adapters") / f"{name}.safetensors"
        shapes = tiny.layers(getattr(whole, kind)(), "to_q", "to_v", "q_proj", "fc1")
        write(made.lora(shapes, scale=scale), path, base=folders(kind))
        return str(path)

    return adapter


@pytest.fixture(scope="session")
def style(adapter_for):
    return adapter_for("sd15", "style", 6.0)


@pytest.fixture(scope="session")
def toy(adapter_for):
    return adapter_for("sd15", "toy", -9.0)
