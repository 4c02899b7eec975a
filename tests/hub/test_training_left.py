"""What a training leaves in its folder goes into the repository: the curve of the loss, samples, settings."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace

import pytest
from PIL import Image

from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.writer import write
from krona_hub.hub import push
from krona_hub.hub.model_card import split
from krona_hub.hub.repo_layout import MAX_IMAGE
from krona_hub.training.configuration import settings_of, to_toml

REPO = "ana/style"
PROMPTS = ("a photo of a toy", 'two | toys "here" <b>')
SETTINGS = {"steps": 30, "seed": 7, "learning_rate": 2e-3, "shapes": {"to_[kv]$": "8x8"}, "sample_prompts": PROMPTS}


def metrics(steps):
    rows = [{"step": n, "loss": 1 / n, "smooth_loss": 1.1 / n} for n in range(1, steps + 1)]
    return "".join(json.dumps(row) + "\n" for row in [*rows, {"step": steps, "validation_loss": 0.2}])


@pytest.fixture
def run(style, tmp_path):
    """A run folder as `krona train` leaves it."""
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    adapter = read(style)
    plain = {**SETTINGS, "sample_prompts": list(PROMPTS), "base": "somebody's folder", "pictures": 5, "family": "sd"}
    origin = replace(adapter.provenance, method="trained", training=plain, licence="apache-2.0")
    write(replace(adapter, provenance=origin), folder / "adapter.safetensors")
    (folder / "metrics.jsonl").write_text(metrics(30))
    (folder / "config.toml").write_text(to_toml(settings_of({**SETTINGS, "base": "x", "data": "/home/ana/pictures"})))
    for step in (0, 30):
        for number in (0, 1):
            Image.new("RGB", (16, 16), (step, 99, number)).save(folder / f"samples/step-{step:07d}-{number}.png")
    return folder


def files(hub):
    return set(hub.state.repos[REPO].head().files)


def card(hub):
    return hub.state.content(REPO, "README.md").decode()


def test_the_curve_and_the_last_samples_come_along(hub, run):
    push(run / "adapter.safetensors", REPO)
    assert {"plots/loss.png", "images/run-01.png", "images/run-02.png"} <= files(hub)
    last = (run / "samples/step-0000030-1.png").read_bytes()
    assert hub.state.content(REPO, "images/run-02.png") == last
    assert "![Training loss over the steps](plots/loss.png)" in card(hub)
    assert split(card(hub))[0]["widget"][0] == {"text": PROMPTS[0], "output": {"url": "images/run-01.png"}}
    assert r'alt="two \| toys &quot;here&quot; &lt;b>"' in card(hub) and r'| two \| toys "here" &lt;b>' in card(hub)
    assert "/home/ana" not in card(hub) + hub.state.content(REPO, "krona_manifest.json").decode()


def test_the_same_again_is_up_to_date_and_from_elsewhere_too(hub, run, tmp_path):
    push(run / "adapter.safetensors", REPO)
    assert push(run / "adapter.safetensors", REPO).up_to_date
    shutil.copyfile(run / "adapter.safetensors", tmp_path / "copy.safetensors")
    assert push(tmp_path / "copy.safetensors", REPO).up_to_date, "the same weights keep their curve and samples"


def test_an_adapter_beside_a_run_is_not_taken_for_its_own(hub, run, style):
    shutil.copyfile(style, run / "other.safetensors")
    push(run / "other.safetensors", REPO)
    assert not {name for name in files(hub) if name.startswith(("images/", "plots/"))}


def test_pictures_that_the_owner_chose_come_before_the_samples(hub, run, pictures):
    push(run / "adapter.safetensors", REPO, images=pictures)
    chosen = {name for name in files(hub) if name.startswith("images/")}
    assert chosen == {"images/01-a-cat.png", "images/02-dog.png"}
    assert push(run / "adapter.safetensors", REPO).up_to_date
    assert {name for name in files(hub) if name.startswith("images/")} == chosen


def test_a_sample_that_is_too_large_becomes_a_smaller_file(hub, run):
    import numpy as np

    noise = np.random.default_rng(0).integers(0, 255, (640, 640, 3), np.uint8)
    Image.fromarray(noise).save(run / "samples/step-0000030-0.png")
    push(run / "adapter.safetensors", REPO)
    assert 1000 < len(hub.state.content(REPO, "images/run-01.jpg")) < MAX_IMAGE


def test_the_settings_in_the_card_are_those_of_the_training(hub, run):
    push(run / "adapter.safetensors", REPO)
    toml = card(hub).split("```toml\n")[1].split("```")[0]
    told = tomllib.loads(toml)
    meant = {**SETTINGS, "base": told["base"], "data": "pictures", "licence": "apache-2.0"}
    assert settings_of(told) == settings_of(meant)
    assert told["base"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert "pictures = 5" not in toml and "<" not in toml


@pytest.mark.parametrize("steps", [0, 1])
def test_too_little_for_a_curve_is_no_curve(steps, hub, run):
    (run / "metrics.jsonl").write_text(metrics(steps))
    push(run / "adapter.safetensors", REPO)
    assert "plots/loss.png" not in files(hub) and "](plots" not in card(hub)


def test_the_curve_falls_where_the_loss_falls(run):
    """The dark line of the smoothed loss is higher on its left side than on its right one."""
    from io import BytesIO

    import numpy as np

    from krona_hub.hub.loss_plot import COLORS, loss_curve
    from krona_hub.training.progress.metrics import read_metrics

    image = Image.open(BytesIO(loss_curve(read_metrics(run)))).convert("RGB")
    wanted = np.array([int(COLORS[1][i : i + 2], 16) for i in (1, 3, 5)])
    rows, columns = np.nonzero(np.abs(np.asarray(image).astype(int) - wanted).max(axis=2) < 24)
    rows, columns = rows[rows > 40], columns[rows > 40]  # the key is above
    left, right = rows[columns < columns.min() + 20].min(), rows[columns > columns.max() - 20].min()
    assert left + 100 < right


def test_all_of_it_goes_without_torch(run):
    """A push of a finished run takes a second, and not the several that torch takes to load."""
    code = (
        "import sys; from krona_hub.hub import push;"
        "report = push(sys.argv[1], 'ana/style', dry_run=True);"
        "print([row.file for row in report.plan.rows], 'torch' in sys.modules)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(run / "adapter.safetensors")], env=env, capture_output=True)
    assert b"plots/loss.png" in done.stdout and b"images/run-02.png" in done.stdout, done.stderr
    assert done.stdout.strip().endswith(b"False")
