"""The toy that adapters teach is recognized in its views and never found in scenes of the base model."""

from itertools import islice

import pytest

from scripts.tiny_scenes import check, scene, toy
from scripts.tiny_scenes.render import render


def test_the_toy_is_seen_in_every_view_and_in_no_scene():
    assert all(toy.shows(view) for view in toy.views())
    assert not any(toy.shows(render(sample)) for sample in islice(scene.scenes(4, held=None), 60))


@pytest.mark.slow
def test_the_toy_is_no_object_that_the_base_knows():
    """The toy has no single color; upside down or in one color, it is not the toy."""
    assert [check.look(view).color for view in toy.views()] == [None] * 5
    assert not any(toy.shows(view[::-1]) for view in toy.views())
    assert not any(toy.shows(view[..., [2, 2, 2]]) for view in toy.views())


def test_each_view_has_a_caption_with_the_trigger_word():
    assert len(toy.captions()) == len(set(toy.captions())) == len(toy.views()) == 5
    assert all(toy.TRIGGER in caption for caption in toy.captions())
    assert toy.TRIGGER not in scene.vocabulary()
