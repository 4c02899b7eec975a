"""The proof: five views of a toy that the base does not know, and pictures show it afterwards.

Real data, a real (if small) base, `krona train` as a person would run it. A control goes beside it: what the same
adapter does to other subjects.
"""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from krona_hub import load_into, train
from krona_hub.bases.shipped import folder_of
from krona_hub.evaluation.colours import SHOWN, identity
from scripts.tiny_scenes import drawing, render, scene, toy

BASE = folder_of("tiny-scenes")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BASE.is_dir(), reason="the base is not in the package")]
SETTINGS = {
    "base": str(BASE), "device": "cpu", "trigger_word": toy.TRIGGER, "targets": "attn+ff", "text_encoders": "attn",
    "steps": 250, "batch_size": 5, "learning_rate": 5e-3, "schedule": "cosine", "min_snr": 0.0,
}  # fmt: skip
ASKED = [f"a photo of a {toy.TRIGGER} on a {t} table, {p}" for t in scene.TABLES for p in scene.POSITIONS]
LIKE, UNLIKE = 0.5, 0.2  # mean identity of pictures of the toy, after the training and before
FALLS = 0.85  # the validation loss of the toy, after the training by before: at most


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


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_five_views_teach_a_toy_and_a_control_stays(seed, folders, tmp_path):
    report = train(
        SETTINGS, seed=seed, data=str(folders / "views"), validation_data=str(folders / "others"), validate_every=125,
        output=str(tmp_path / "toy"),
    )  # fmt: skip
    before, after = report.validation[0][1], report.validation[-1][1]
    assert after <= FALLS * before
    assert loss_of(folders / "world", report.adapter, tmp_path / "a") >= loss_of(
        folders / "world", None, tmp_path / "b"
    )
    scores = identities(report.adapter)
    assert np.mean(scores) > LIKE and np.mean(identities(None)) < UNLIKE
    assert np.mean(np.array(scores) > SHOWN) >= 0.15


def loss_of(folder: Path, adapter, output: Path) -> float:
    """The validation loss of the base, with an adapter or without, on a folder of pictures."""
    still = {
        "trigger_word": "",
        "steps": 1,
        "learning_rate": 0.0,
        "weight_decay": 0.0,
        "batch_size": 1,
        "validate_every": 1,
    }
    start = {"init": str(adapter)} if adapter else {}
    own = {"data": str(folder), "validation_data": str(folder), "output": str(output)}
    return train(SETTINGS | still | start | own).validation[0][1]


def identities(adapter) -> list[float]:
    """Of a picture of the toy on every table and place."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(BASE)
    if adapter:
        load_into(pipe, adapter)
    views = [Image.fromarray(view) for view in toy.views()]
    with torch.no_grad():
        return [identity(Image.fromarray(picture), views) for picture in drawing.draw(pipe, ASKED)]
