"""What is asked is judged before anything is loaded, and every refusal says what would do."""

import pytest

from krona_hub.errors import UsageError
from krona_hub.images.request import checked_machine, checked_prompts, checked_settings, parse_size
from krona_hub.images.schedulers import SAMPLERS, sampler_named

NOTHING = (None, None, None, None, None, {})


def settings(**given):
    names = ("negative", "steps", "guidance", "scheduler", "size", "more")
    return checked_settings(*(given.get(name, none) for name, none in zip(names, NOTHING, strict=True)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_scheduler_is_found_however_it_is_spelt(name):
    assert sampler_named(name) == sampler_named(name.upper().replace("-", " ")) == name


def test_every_scheduler_of_the_table_is_a_class_of_diffusers():
    import diffusers

    for sampler in SAMPLERS.values():
        assert hasattr(diffusers, sampler.kind) and (sampler.flow is None or hasattr(diffusers, sampler.flow))


@pytest.mark.parametrize(("wrong", "meant"), [("eular", "euler"), ("dmp++", "dpm++"), ("unpic", "unipc")])
def test_a_misspelt_scheduler_names_the_nearest(wrong, meant):
    with pytest.raises(UsageError, match=rf"Did you mean {meant.replace('+', '[+]')}\?"):
        settings(scheduler=wrong)


def test_default_is_the_scheduler_of_the_base():
    assert settings(scheduler="default").scheduler is None


@pytest.mark.parametrize(
    ("size", "advice"), [("100x60", "104x64"), ("63", "64x64"), ("3x8", "8x8"), ((65, 64), "64x64")]
)
def test_a_size_between_latent_pixels_names_the_nearest_that_is_none(size, advice):
    with pytest.raises(UsageError, match=f"--size {advice}"):
        parse_size(size)


@pytest.mark.parametrize("size", ["big", "64x", "64x64x64", "0x64", "-8x8", ""])
def test_what_is_no_size_says_how_one_is_written(size):
    with pytest.raises(UsageError, match="--size 768x512"):
        parse_size(size)


@pytest.mark.parametrize("prompts", [[], "", ["a", "  "]])
def test_without_words_there_is_nothing_to_draw(prompts):
    with pytest.raises(UsageError, match="--prompt"):
        checked_prompts(prompts)


@pytest.mark.parametrize(
    "given",
    [{"steps": 0}, {"steps": 1001}, {"guidance": -1.0}, {"guidance": float("nan")}, {"more": {"prompt": "x"}}],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(given):
    with pytest.raises(UsageError):
        settings(**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("gpu", None, None, False, 1), "cpu, cuda"),
        ((None, "int8", None, False, 1), "bfloat16"),
        ((None, None, "disk", False, 1), "sequential"),
        (("cpu", None, "model", False, 1), "--offload"),
        ((None, None, None, False, 0), "--batch"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(given, words):
    with pytest.raises(UsageError, match=words):
        checked_machine(*given)
