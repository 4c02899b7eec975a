"""`krona train`: flags become settings, mistakes are reported, the plan and the result are printed."""

import json

import pytest

from krona_hub.cli.main import main
from krona_hub.training.settings import KINDS
from tests.training.conftest import bases, photos  # noqa: F401  fixtures


@pytest.fixture
def line(bases, photos, tmp_path):  # noqa: F811
    """A command line that trains for about a second."""
    return [
        "train", "--base", bases("sd15"), "--data", photos, "--prompt", "a photo", "--resolution", "16", "--steps", "2",
        "--device", "cpu", "-o", str(tmp_path / "run"),
    ]  # fmt: skip


def test_every_setting_has_a_flag(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(kind.flag in text for kind in KINDS.values())


def test_a_training_prints_what_it_made_and_flags_win_over_the_file(line, tmp_path, capsys):
    config = tmp_path / "config.toml"
    config.write_text("steps = 9\nbatch_size = 2\n")
    assert main([*line, str(config), "--shapes", r"attn2\.to_k=8x4", "--flip", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 2 and report["parameters"] > 0
    written = (tmp_path / "run/config.toml").read_text()
    assert "batch_size = 2" in written and "flip = true" in written and '"attn2\\\\.to_k" = "8x4"' in written


def test_lists_are_given_with_commas_or_one_by_one(line, tmp_path, capsys):
    assert main([*line, "--export", "lycoris", "--export", "lora,krona", "--json"]) == 0
    names = [path.rsplit("/", 1)[1] for path in json.loads(capsys.readouterr().out)["exports"]]
    assert names == ["adapter.lycoris.safetensors", "adapter.lora.safetensors", "adapter.krona.safetensors"]


def test_a_check_is_of_a_new_training(tmp_path, capsys):
    assert main(["train", "--resume", str(tmp_path), "--check"]) == 2
    assert "--check" in capsys.readouterr().err


def test_a_check_prints_the_plan(line, tmp_path, capsys):
    assert main([*line, "--check"]) == 0
    out = capsys.readouterr().out
    assert "5: 1 at 10x20" not in out and "parameters" in out and "s per step" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--shapes", "8x4"], "REGEX=a1xa2"),
        (["--stepz", "3"], "--steps"),
        (["--caption-dropout", "2"], "at most 1"),
        (["--preset", "paper"], "paper-sd"),
    ],
)
def test_mistakes_are_told_with_the_way_out(line, more, words, capsys):
    assert main([*line, *more]) == 2
    assert words in capsys.readouterr().err


def test_a_resumed_run_must_be_one(tmp_path, capsys):
    assert main(["train", "--resume", str(tmp_path)]) == 7
    assert "is not a run folder" in capsys.readouterr().err
