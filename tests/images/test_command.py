"""`krona generate` from the outside: what it prints, what it opens, how it fails."""

import json

import click
import pytest

from krona_hub.cli.main import main

WORDS = ["--prompt", "a cat", "--steps", "2"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_comparison_is_listed_and_lies_where_it_is_said_to_lie(base, style, toy, here, capsys):
    status = main(["generate", base, *WORDS, "--adapter", f"{style}:0.5", "-a", toy])
    out = capsys.readouterr().out
    assert status == 0 and "style × 0.5" in out and "toy differs from style × 0.5 by " in out
    assert "krona-pictures/grid.png" in out and (here / "krona-pictures/grid.png").exists()
    assert main(["generate", "--again", "krona-pictures", "-o", "again"]) == 0
    assert "3 of 3 images match the record" in capsys.readouterr().out


def test_set_reads_values_as_json_and_text(base, here, capsys):
    line = ["generate", base, *WORDS, "--set", "guidance_rescale=0.5", "--set", "eta=1", "--json", "-o", "x"]
    assert main(line) == 0
    assert json.loads(capsys.readouterr().out)["record"]["more"] == {"guidance_rescale": 0.5, "eta": 1}


def test_open_shows_the_grid_or_the_only_picture(base, here, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(click, "launch", lambda path: opened.append(path) or 0)
    assert main(["generate", base, *WORDS, "--open", "-o", "one"]) == 0
    assert main(["generate", base, *WORDS, "--open", "-o", "two", "--batch", "2"]) == 0
    assert opened == ["one/001.png", "two/grid.png"]
    monkeypatch.setattr(click, "launch", lambda path: 1)
    assert main(["generate", base, *WORDS, "--open", "-o", "three"]) == 0
    assert "No image viewer" in capsys.readouterr().err


def test_an_adapter_of_another_base_is_named_with_its_modules(base, adapter_for, here, capsys):
    other = adapter_for("sdxl", "other", 1.0)
    status = main(["generate", base, *WORDS, "--adapter", other])
    err = capsys.readouterr().err
    assert status == 5 and "KH160" in err and "fix: " in err and not (here / "krona-pictures").exists()
