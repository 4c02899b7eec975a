"""Images and captions match, and the check on them can fail."""

from itertools import islice

import numpy as np
import pytest

from scripts.tiny_scenes import check, images, scene, training
from scripts.tiny_scenes.render import render
from scripts.tiny_scenes.shapes import REACH, SURFACES

RED_CUBE = scene.Scene("cube", "red", "large", "on the left", "blue", "white", "right", 7)
OF_EVERY_KIND = [RED_CUBE._replace(shape=s, color=c) for s in scene.SHAPES for c in scene.COLORS]


@pytest.fixture(scope="module")
def held_out():
    """150 renders of held-out scenes; the templates of the check come from other seeds."""
    scenes = list(islice(scene.scenes(seed=5, held=True), 150))
    return scenes, [render(s) for s in scenes]


def test_equal_scenes_are_equal_pictures_and_seeds_matter():
    assert np.array_equal(render(RED_CUBE), render(RED_CUBE))
    assert not np.array_equal(render(RED_CUBE), render(RED_CUBE._replace(seed=8)))
    assert render(RED_CUBE).shape == (64, 64, 3)


def test_every_word_of_a_scene_changes_the_picture():
    other = {"shape": "ring", "color": "cyan", "size": "small", "position": "on the right", "table": "tiled",
             "wall": "dark", "light": "left"}  # fmt: skip
    for field, word in other.items():
        changed = np.abs(render(RED_CUBE._replace(**{field: word})).astype(int) - render(RED_CUBE))
        assert changed.max() > 40, field


@pytest.mark.parametrize("name", scene.SHAPES)
def test_no_surface_reaches_beyond_the_ball_that_rays_are_tested_against(name):
    directions = np.random.default_rng(0).normal(size=(3, 4000))
    points = (REACH * directions / np.linalg.norm(directions, axis=0)).astype(np.float32)
    assert SURFACES[name](points).min() > 0


@pytest.mark.parametrize("name", scene.SHAPES)
def test_no_surface_promises_more_than_the_distance(name):
    """A distance field grows by at most one per unit of length, so that a marching ray never steps through."""
    rng = np.random.default_rng(1)
    start = rng.uniform(-1.5, 1.5, (3, 4000)).astype(np.float32)
    step = rng.normal(scale=0.05, size=start.shape).astype(np.float32)
    grown = np.abs(SURFACES[name](start + step) - SURFACES[name](start))
    assert (grown <= np.linalg.norm(step, axis=0) + 1e-5).all()


def test_training_never_shows_a_held_out_combination():
    kept = {(s.shape, s.color, s.size, s.table) for s in images.training_scenes(3000)}
    held = {(s.shape, s.color, s.size, s.table) for s in islice(scene.scenes(9, held=True), 300)}
    assert not kept & held
    assert {word for combination in held for word in combination} == {w for c in kept for w in c}


def test_captions_say_nothing_but_the_scene():
    rng = np.random.default_rng(0)
    for sample in islice(scene.scenes(3), 200):
        words = set(scene.training_caption(sample, rng).replace(",", "").split())
        assert {sample.shape, sample.color} <= words <= set(scene.caption(sample).replace(",", "").split())


@pytest.mark.slow
def test_the_check_finds_what_is_there_on_held_out_renders(held_out):
    scenes, images = held_out
    found = check.score(images, scenes)
    assert found.shape >= 0.97
    assert found.color >= 0.99
    assert found.position >= 0.99


@pytest.mark.slow
def test_the_check_falls_to_chance_on_swapped_captions(held_out):
    scenes, images = held_out
    found = check.score(images, scenes[1:] + scenes[:1])
    assert found.shape < 0.3  # one of six
    assert found.color < 0.25  # one of eight


@pytest.mark.slow
def test_the_check_finds_nothing_in_noise_and_in_empty_rooms():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    smooth = noise[:, ::8, ::8].repeat(8, 1).repeat(8, 2)  # blobs as large as objects
    empty = np.full((1, 64, 64, 3), 180, np.uint8)
    named = [check.look(image).shape for image in (*noise, *smooth, *empty)]
    assert sum(name is not None for name in named) <= 2


def test_the_check_names_no_shape_that_it_does_not_know():
    image = render(RED_CUBE._replace(table="white"))
    mask = check.find(image)
    broken = image.copy()
    broken[mask & (np.indices(mask.shape)[1] % 6 < 2)] = 200  # the cube in strips
    assert check.look(broken).shape is None


def test_the_check_refuses_a_second_object():
    left, right = (render(RED_CUBE._replace(position=p, color=c)) for p, c in
                   [("on the left", "red"), ("on the right", "green")])  # fmt: skip
    both = np.concatenate([left[:, :32], right[:, 32:]], axis=1)
    assert check.look(both) == check.NOTHING


def test_pictures_are_rendered_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CHUNK", 4)
    assert list(images.prepare(tmp_path, 8, workers=1)) == [4, 8]
    first = images.load(tmp_path, 8)
    (tmp_path / "pictures-000004.npy").unlink()
    list(images.prepare(tmp_path, 8, workers=1))
    assert np.array_equal(images.load(tmp_path, 8), first)
    assert np.array_equal(first[5], render(images.training_scenes(8)[5]))


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 5)
    recipe = training.Recipe(steps=15, batch=2, rate=0.1, warmup=2)

    def run(path):
        torch.manual_seed(0)
        return training.Run(torch.nn.Linear(3, 2), recipe, path)

    def loss(model, generator):
        return model(torch.randn(2, 3, generator=generator)).square().mean()

    whole, stopped = run(tmp_path / "whole.pt"), run(tmp_path / "part.pt")
    list(whole.train(loss))
    list(islice(stopped.train(loss), 7))  # the checkpoint is that of step 5
    again = run(tmp_path / "part.pt")
    assert again.step == 5
    list(again.train(loss))
    assert torch.equal(again.averaged.weight, whole.averaged.weight)
    assert not torch.equal(again.averaged.weight, again.model.weight)
