"""The shipped base model and adapters match their model card and the README."""

import json
import re
from importlib.resources import as_file, files
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

import krona_hub
from krona_hub.assets.shipped import folder_of
from krona_hub.bases.loading import load_base
from krona_hub.checkpoints.header import read_header
from krona_hub.formats.reading.describe import describe
from scripts.make_tiny_adapters import FILES, PROMPTS
from scripts.tiny_scenes import sampling, toy

BASE = folder_of("tiny-scenes")
SHOWN = 0.6  # minimum share of images that show the toy with an adapter; the base model alone never shows it


def adapters() -> dict[str, Path]:
    with as_file(files("krona_hub.assets")) as folder:
        return {name: folder / file for name, file in FILES.items()}


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(BASE)


def test_base_and_adapters_are_small():
    assert size(BASE) <= 12_000_000
    assert sum(path.stat().st_size for path in adapters().values()) < 1_000_000


def test_the_base_is_known_by_its_name():
    named, placed = load_base("tiny-scenes"), load_base(BASE)
    assert placed.family == named.family == "tiny-scenes"
    assert dict(named.layers()) == dict(placed.layers())


@pytest.mark.slow
def test_the_base_draws_what_held_out_prompts_say(pipe):
    """The card matches this measurement up to two images, because other processors round differently."""
    score = sampling.measure(pipe, 200)
    assert score.shape >= 0.80
    assert score.color >= 0.90
    found = re.search(r"^\| ([\d.]+)% \| ([\d.]+)% \| ([\d.]+)% \|$", (BASE / "README.md").read_text(), re.M)
    assert found is not None
    assert [float(share) / 100 for share in found.groups()] == pytest.approx(score[:3], abs=0.011)


def test_every_module_of_the_adapters_is_the_base_s_and_alpha_is_not_rank():
    for path in adapters().values():
        found = describe(path)
        assert found.candidates == ("tiny-scenes",), path.name
        assert not found.unmatched
        assert all(module.alpha != module.rank for module in found.modules if module.alpha is not None), path.name
    assert {module.kind for module in describe(adapters()["lokr"]).modules} == {"lokr"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora diffusers", "lokr"])
def test_adapters_teach_the_toy_and_leave_the_base_as_it_was(pipe, name):
    plain = sampling.generate(pipe, PROMPTS)
    assert not any(toy.shows(picture) for picture in plain)
    krona_hub.load_into(pipe, adapters()[name], name="toy")
    taught = sampling.generate(pipe, PROMPTS)
    krona_hub.unload(pipe, "toy")
    assert sum(map(toy.shows, taught)) >= SHOWN * len(PROMPTS)
    assert (sampling.generate(pipe, PROMPTS[:2])[0] == plain[0]).all()


def test_no_file_names_a_folder_of_the_machine_that_made_it():
    for path in adapters().values():
        assert not re.search(r'"/|:/', "".join(read_header(path).metadata.values())), path.name


def test_the_record_of_the_training_says_the_trigger_word():
    with as_file(files("krona_hub.assets") / "zorbi.json") as record:
        found = json.loads(record.read_text())
    assert found["trigger"] == toy.TRIGGER
    assert found["shows_the_toy"]["base"] == 0
