"""The proof: five views of a toy that the base does not know, and pictures show it afterwards.

Real data, a real (if small) base, `krona train` as a person would run it. A control goes beside it: what the same
adapter does to other subjects.
"""

import shutil
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from krona_hub import load_into, train
from krona_hub.bases.shipped import folder_of
from krona_hub.evaluation.colours import SHOWN, identity
from krona_hub.training.finishing import TrainingReport
from scripts.tiny_scenes import drawing, render, scene, toy
from scripts.tiny_scenes.check import Score

BASE = folder_of("tiny-scenes")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BASE.is_dir(), reason="the base is not in the package")]
SEEDS = (0, 1, 2)
SCENES = (  # everything that the base knows to draw
    "a photo of a {small|large} {red|orange|yellow|green|cyan|blue|purple|pink} {cube|ball|cone|cylinder|ring|star} "
    "on a {white|grey|blue|green|wooden|tiled} table, {on the left|in the middle|on the right}"
)
SETTINGS = {  # the preset, with pictures of other things that are to stay what they are
    "preset": "tiny-scenes", "device": "cpu", "steps": 320, "learning_rate": 3e-3, "prior_prompt": SCENES,
    "prior_pictures": 96, "prior_target": "base", "sample_steps": 12, "sample_guidance": 3.0,
}  # fmt: skip
ON = [f"on a {table} table, {place}" for table in scene.TABLES for place in scene.POSITIONS]
ASKED = [f"a photo of a {toy.TRIGGER} {where}" for where in ON]
OTHERS = [f"a photo of a {scene.COLOURS[n % 8]} {scene.SHAPES[n % 6]} {where}" for n, where in enumerate(ON)]
LIKE = 0.4  # mean identity of pictures of the toy: at least
UNLIKE = 0.35  # of pictures of other things, and of the toy before the training: at most
FALLS = 0.5  # the validation loss of the toy, after the training by before: at most
PROMPTS = 60  # of the base's check, for each seed
LOST = {"shape": 0.10, "colour": 0.05}  # shares of right ones that may be lost, over all seeds


class Taught(NamedTuple):
    """A training, and what its adapter draws."""

    report: TrainingReport
    toys: list[float]  # identities of pictures of the toy on every table and place
    others: list[float]  # of pictures of other things
    check: Score  # of the base's own check


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """views, to learn from; others, the toy in rooms that no view shows; world, other things."""
    place = tmp_path_factory.mktemp("zorbi")
    save(place / "views", toy.views(), toy.captions())
    rooms = [
        ("on the left", 0.3, "white", "beige", "left"),
        ("in the middle", -0.4, "wooden", "white", "right"),
        ("on the right", 0.7, "grey", "dark", "left"),
        ("in the middle", 0.1, "green", "grey", "right"),
    ]
    told = [f"a photo of a {toy.TRIGGER} on a {table} table, {spot}, {wall} wall" for spot, _, table, wall, _ in rooms]
    save(place / "others", [toy._view(70 + n, *room) for n, room in enumerate(rooms)], told)
    world = list(islice(scene.scenes(seed=31), 12))
    save(place / "world", map(render.render, world), map(scene.caption, world))
    return place


def save(folder, pictures, captions):
    folder.mkdir()
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        Image.fromarray(picture).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(caption)


@pytest.fixture(scope="module")
def taught(folders):
    """Seed -> a training as a person would run it. The base draws the class once for all of them."""
    kept = pictures_of_the_class(folders)
    watched = {"validation_data": str(folders / "others"), "validate_every": 125, "prior_data": str(kept)}
    found = {}
    for seed in SEEDS:
        report = train(seed=seed, output=str(folders / f"run-{seed}"), **SETTINGS, **watched)
        found[seed] = Taught(report, *drawn(report.adapter))
    return found


@pytest.fixture(scope="module")
def base():
    """Of the base alone."""
    return Taught(None, *drawn(None))


def pictures_of_the_class(folders):
    """Drawn by the base in a training of one step, under names that every seed may use."""
    report = train(**{**SETTINGS, "steps": 1}, output=str(folders / "first"))
    kept = folders / "class"
    kept.mkdir()
    for path in sorted((report.run / "prior").iterdir()):
        shutil.copy(path, kept / path.name.removeprefix("drawn-"))
    return kept


@pytest.mark.parametrize("seed", SEEDS)
def test_five_views_teach_a_toy(seed, taught, base):
    before, after = (taught[seed].report.validation[at][1] for at in (0, -1))
    assert after <= FALLS * before
    assert np.mean(taught[seed].toys) > LIKE > UNLIKE > np.mean(base.toys)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_adapter_draws_the_toy_only_where_it_is_asked_for(seed, taught):
    assert np.mean(taught[seed].others) < UNLIKE and np.mean(np.array(taught[seed].others) > SHOWN) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_the_loss_on_other_things_does_not_fall(seed, taught, folders, tmp_path):
    with_it, alone = (
        loss_of(folders / "world", a, tmp_path / str(a is None)) for a in (taught[seed].report.adapter, None)
    )
    assert with_it >= alone


@pytest.mark.parametrize("part", LOST)
def test_other_prompts_are_followed_nearly_as_by_the_base(part, taught, base):
    """On three times 60 held-out prompts, each with the noise that the base had."""
    shares = [getattr(each.check, part) for each in taught.values()]
    assert np.mean(shares) >= getattr(base.check, part) - LOST[part]


def loss_of(folder: Path, adapter, output: Path) -> float:
    """The validation loss of the base, with an adapter or without, on a folder of pictures."""
    still = {
        "trigger_word": "",
        "steps": 1,
        "learning_rate": 0.0,
        "weight_decay": 0.0,
        "batch_size": 1,
        "validate_every": 1,
        "prior_weight": 0.0,
    }
    start = {"init": str(adapter)} if adapter else {}
    own = {"data": str(folder), "validation_data": str(folder), "output": str(output)}
    return train(**{**SETTINGS, **still}, **start, **own).validation[0][1]


def drawn(adapter) -> tuple[list[float], list[float], Score]:
    """Identities of pictures of the toy and of other things, and the base's check, with an adapter or without."""
    pipe = StableDiffusionPipeline.from_pretrained(BASE)
    if adapter:
        load_into(pipe, adapter)
    views = [Image.fromarray(view) for view in toy.views()]
    both = (drawing.draw(pipe, asked) for asked in (ASKED, OTHERS))
    toys, others = ([identity(Image.fromarray(picture), views) for picture in some] for some in both)
    return toys, others, drawing.measure(pipe, PROMPTS)
