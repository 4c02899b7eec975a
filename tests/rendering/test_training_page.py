"""The page of a training, from plain values and from a run folder."""

import math
import re
from pathlib import Path

import pytest
from PIL import Image

from krona_hub.errors import DivergedError
from krona_hub.rendering.html.embedded_images import SIZES, samples_table
from krona_hub.rendering.html.markup import MARK
from krona_hub.rendering.html.training_report import Run, thinned, training_html, verdict
from krona_hub.training.api import train
from tests.training.bases import save_base, save_photos


def rows_of(losses, validation=()):
    rows = [{"step": i + 1, "loss": v, "smooth_loss": v, "seconds": 0.5} for i, v in enumerate(losses)]
    return rows + [{"step": s, "validation_loss": v} for s, v in validation]


def test_the_verdict_is_computed_from_the_validation():
    run = Run("toy", rows_of([1.0, 0.9], [(0, 0.5), (1, 0.3), (2, 0.4)]), {}, None)
    assert "The validation loss fell by 20.0%, from 0.5 to 0.4" in verdict(run)
    assert "lowest at step 1 (0.3)" in verdict(run)


def test_without_a_validation_the_verdict_says_how_little_is_known():
    assert "fell by 50.0%" in verdict(Run("toy", rows_of([2.0, 1.0]), {}, None))
    assert "says little" in verdict(Run("toy", rows_of([2.0, 1.0]), {}, None))


def test_an_empty_run_and_a_loss_that_is_no_number_have_a_page():
    for rows in ([], rows_of([math.nan, 1.0, 2.0])):
        document = training_html(Run("toy", rows, {}, None))
        assert document.startswith(MARK) and "nan" not in document.lower()


def test_many_steps_are_put_together_and_their_mean_stays():
    points = [(float(i), float(i % 7)) for i in range(12_000)]
    few = thinned(points)
    assert len(few) <= 300
    assert sum(v for _, v in few) / len(few) == pytest.approx(sum(v for _, v in points) / len(points), abs=0.01)


def test_hostile_prompts_and_settings_are_escaped(tmp_path):
    Image.new("RGBA", (300, 200), "red").save(tmp_path / "a.png")
    evil = '"><script>alert(1)</script>'
    run = Run(evil, rows_of([1.0, 2.0]), {evil: evil}, None, {3: [tmp_path / "a.png"]}, [evil])
    document = training_html(run)
    assert document.count("<script") == 1
    assert f'width="{SIZES[0][0]}"' in document


def test_left_out_steps_of_samples_are_said(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    drawn = samples_table({step: [tmp_path / "a.png"] for step in range(30)}, ["p"])
    assert "12 of 30 steps are shown" in drawn
    assert drawn.count("<img") == 12


@pytest.mark.parametrize("prompts", [1, 2, 3, 4])
def test_every_sample_is_shown_with_its_step_and_its_prompt(prompts, tmp_path):
    names = [f"a photo of toy {n}" for n in range(prompts)]
    for n in range(prompts):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"{n}.png")
    drawn = samples_table({step: [tmp_path / f"{n}.png" for n in range(prompts)] for step in (0, 50)}, names)
    assert all(drawn.count(f'alt="step {step}: {name}"') == 1 for step in (0, 50) for name in names)
    assert all(drawn.count(f">{name}<") == 1 for name in names)


def test_a_run_that_went_on_with_fewer_prompts_shows_what_there_is(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    drawn = samples_table({0: [tmp_path / "a.png"] * 2, 50: [tmp_path / "a.png"]}, ["a toy"])
    assert drawn.count("<img") == 3 and drawn.count("a toy") == 3


@pytest.mark.slow
def test_a_training_ends_with_a_page_that_holds_no_place_of_the_machine(tmp_path):
    base, run = save_base("sd15", tmp_path), tmp_path / "run"
    photos = str(save_photos(tmp_path / "photos"))
    train(
        base=str(base), data=photos, prompt="a <b> toy", output=str(run), steps=3, resolution=16,
        device="cpu", held_out=1, validate_every=1, sample_every=2, sample_steps=1,
    )  # fmt: skip
    document = (run / "report.html").read_text("utf-8")
    assert "Training loss" in document and "Validation loss" in document and "data:image/png" in document
    assert "a &lt;b&gt; toy" in document
    assert str(tmp_path) not in document
    assert not re.findall(r"https?://", document)
    assert Path(run / "adapter.safetensors").exists()


@pytest.mark.slow
def test_a_training_that_ends_before_its_last_step_has_a_page(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(DivergedError):
        train(
            base=str(save_base("sd15", tmp_path)), data=str(save_photos(tmp_path / "photos")), prompt="a toy",
            output=str(run), steps=40, resolution=16, device="cpu", learning_rate=1e30, clip=0.0,
        )  # fmt: skip
    document = (run / "report.html").read_text("utf-8")
    assert re.search(r"\d+ of 40 steps\.", document) and "has no adapter yet" in document
