"""Printing of commands: tables in a pipe, JSON as one document, notes on stderr."""

import json
import re
import sys

import click
import pytest

from krona_hub.cli import console, progress
from krona_hub.cli.console import emit, krona_command, log, show_facts, show_table

LONG = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0" * 4


@krona_command("toy", examples=("krona toy",))
def toy() -> None:
    """A command for these tests."""
    log("chatter")
    emit({"answer": 42, "error": float("nan")}, lambda: show_facts([("answer", 42), ("nothing", None)]))


def run(*arguments: str) -> None:
    toy.main(list(arguments), standalone_mode=False)


def test_text_goes_to_stdout_and_chatter_to_stderr(capsys):
    run()
    assert capsys.readouterr() == ("answer  42\n", "chatter\n")


def test_what_is_looked_for_on_the_hub_is_said_aloud(capsys, tmp_path):
    console.announce(str(tmp_path), "nobody/nothing", None, "here.safetensors")
    assert capsys.readouterr().err == "nobody/nothing is not a local path; looking it up on the Hugging Face Hub.\n"


def test_quiet_leaves_the_result_alone(capsys):
    run("--quiet")
    assert capsys.readouterr() == ("answer  42\n", "")


def test_json_is_one_document_without_chatter_and_without_nan(capsys):
    run("--json")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"answer": 42, "error": None} and not err


def test_a_pipe_never_cuts_or_wraps_a_name(capsys):
    show_table(("layer", ">parameters"), [(LONG, 1234567)])
    header, row = capsys.readouterr().out.splitlines()
    assert row == f"{LONG}   1,234,567" and header.startswith("layer")


def test_a_terminal_folds_a_long_name_and_loses_nothing_of_it(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    show_table(("layer", ">parameters"), [(LONG, 7)])
    lines = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "".join(line.split(" ")[0] for line in lines[1:]) == LONG


def test_brackets_in_a_cell_are_text(capsys):
    show_table(("form",), [("[[1]] ⊗ up·down [bold]",)])
    assert "[[1]] ⊗ up·down [bold]" in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [True, False])
def test_colour_appears_only_in_a_terminal_without_no_color(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show_table(("head",), [("x",)])
    assert ("\x1b[" in capsys.readouterr().out) == terminal
    monkeypatch.setenv("NO_COLOR", "1")
    show_table(("head",), [("x",)])
    assert "\x1b[3" not in capsys.readouterr().out


def on_a_terminal(monkeypatch, *seconds: float) -> None:
    """Simulate a terminal and a clock that returns these times in order."""
    clock = iter(seconds)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


def test_a_bar_appears_after_two_seconds_only_and_goes_away(capsys, monkeypatch):
    on_a_terminal(monkeypatch, 0.0, 1.0, 10.0)
    with progress.progress("layers") as step:
        step(0, 4)
        assert capsys.readouterr().err == ""
        step(3, 4)
        assert "3/4  0:03 left" in capsys.readouterr().err
    assert capsys.readouterr().err == "\r\x1b[K"


def test_a_bar_of_bytes_tells_the_rate_and_the_time_left_since_the_work_began(capsys, monkeypatch):
    on_a_terminal(monkeypatch, 0.0, 7.0, 11.0, 11.05, 15.0)
    with progress.byte_progress("merged") as step:
        step(0, 5_000_000_000)
        assert "0 B of 5.0 GB" in capsys.readouterr().err, "torch took seven seconds: no rate yet"
        step(1_000_000_000, 5_000_000_000)
        assert "1.0 GB of 5.0 GB  250.0 MB/s  0:16 left" in capsys.readouterr().err
        step(1_000_000_001, 5_000_000_000)
        assert capsys.readouterr().err == "", "updated ten times a second at most"
        step(2_000_000_000, None)
        assert capsys.readouterr().err == "\r\x1b[Kmerged 2.0 GB  250.0 MB/s"


def test_reports_of_new_bytes_are_added_up():
    seen = []
    more = progress.counting(lambda done, total: seen.append((done, total)), 7)
    for nbytes in (3, 0, 4):
        more(nbytes)
    assert seen == [(3, 7), (3, 7), (7, 7)]


def test_a_log_file_gets_no_bar(capsys, monkeypatch):
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress("layers") as step:
        step(1, 4)
    assert capsys.readouterr().err == ""


def test_common_options_come_last_in_the_help():
    assert [p.name for p in toy.params] == ["quiet", "json"] or [p.name for p in toy.params] == ["json", "quiet"]
    assert isinstance(toy, click.Command) and toy.examples == ("krona toy",)
