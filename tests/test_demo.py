"""The demo adapters are the output of their script and are marked so; the commands of the demo can be repeated."""

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from krona_hub.assets.demo import ASSETS, STEPS, prepare, results
from krona_hub.checkpoints.header import read_header
from krona_hub.cli.main import main
from krona_hub.errors import NotFoundError, ResourceError
from scripts import make_demo_adapter
from scripts.tiny_scenes import toy

GENERATED = ("demo_lora.safetensors", "demo_lokr.safetensors")


@pytest.mark.parametrize("name", GENERATED)
def test_the_script_makes_the_adapters_that_ship(name, tmp_path):
    make_demo_adapter.main(tmp_path)
    made, shipped = load_file(tmp_path / name), load_file(make_demo_adapter.ASSETS / name)
    assert made.keys() == shipped.keys()
    for key, tensor in shipped.items():  # another libm may round the last bit of a half differently
        assert torch.allclose(made[key].float(), tensor.float(), rtol=1e-3, atol=1e-7), key


@pytest.mark.parametrize("name", GENERATED)
def test_the_adapters_say_that_they_were_generated(name):
    metadata = read_header(make_demo_adapter.ASSETS / name).metadata
    assert "generated, not trained" in metadata["modelspec.title"]
    assert "make_demo_adapter.py" in metadata["modelspec.description"]


def test_the_assets_are_small():
    assert sum((make_demo_adapter.ASSETS / name).stat().st_size for name in ASSETS.values()) < 500_000


def test_prepare_writes_the_adapters_and_the_commands(tmp_path):
    commands = prepare(tmp_path / "demo")
    assert (tmp_path / "demo/commands.txt").read_text().splitlines() == list(commands) and len(commands) == len(STEPS)
    assert [path.name for path in results(tmp_path / "demo")] == ["lora.safetensors", "lokr.safetensors"]


def test_a_place_that_cannot_be_written_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="--folder"):
        prepare(tmp_path / "file" / "demo")


def test_results_of_no_demo_are_not_found(tmp_path):
    with pytest.raises(NotFoundError):
        results(tmp_path / "nothing")


@pytest.mark.slow
def test_the_demo_shows_the_toy_and_its_commands_can_be_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    shown = capsys.readouterr()
    assert "kept as LoRA" in shown.out and " ⊗ " in shown.out and "zorbi" in shown.err
    assert shown.out.count("Match: ") == 2
    assert_toys(tmp_path / "krona-demo/pictures")
    for line in (tmp_path / "krona-demo/commands.txt").read_text().splitlines():
        assert main(shlex.split(line)[1:]) == 0, line


def assert_toys(folder):
    """Original, converted and merged generate the same images, most of them of the toy; the base alone never does."""
    record = json.loads((folder / "record.json").read_text())
    columns = {}
    for image in record["pictures"]:
        columns.setdefault(image["column"], []).append(np.asarray(Image.open(folder / image["file"])))
    assert list(columns) == ["base", "lokr", "lokr-as-lora", "merged"]
    shares = {name: np.mean([toy.shows(image) for image in images]) for name, images in columns.items()}
    assert shares["base"] == 0 and min(shares[name] for name in ("lokr", "lokr-as-lora", "merged")) >= 2 / 3
    original = np.stack(columns["lokr"]).astype(int)
    apart = {name: np.abs(np.stack(columns[name]) - original).mean() for name in columns}
    assert apart["lokr-as-lora"] < 0.1 and apart["merged"] < 2 and apart["base"] > 5
