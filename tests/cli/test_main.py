import json
import os
import subprocess
import sys

import pytest
import rich_click
from PIL import Image

from krona_hub.cli.failure_report import describe
from krona_hub.cli.main import COMMANDS, cli, main
from krona_hub.errors import LossyError


def test_help_lists_every_command_with_its_summary(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, entry in COMMANDS.items():
        assert name in shown and entry.summary[:30] in shown


def test_help_groups_every_command_once():
    grouped = [name for group in rich_click.rich_click.COMMAND_GROUPS["krona"] for name in group["commands"]]
    assert sorted(grouped) == sorted(COMMANDS)


def test_help_imports_no_command():
    code = "import sys; from krona_hub.cli.main import main; main(['--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1].split()
    assert "krona_hub.cli.main" in loaded and not {entry.module for entry in COMMANDS.values()} & set(loaded)


def test_a_bare_krona_shows_the_help(capsys):
    assert main([]) == 0
    assert "Usage" in capsys.readouterr().out


def test_a_misspelt_command_gets_a_suggestion(capsys):
    assert main(["completoin"]) == 2
    error = capsys.readouterr().err
    assert error == "error KH101: No such command 'completoin'.\nfix: Did you mean completion?\n"


def test_a_misspelt_option_gets_a_suggestion(capsys):
    assert main(["completion", "bash", "--jsn"]) == 2
    assert "fix: Did you mean --json?" in capsys.readouterr().err


def test_errors_are_one_json_document_on_stdout_where_json_was_asked_for(capsys):
    assert main(["completion", "tcsh", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["error"].keys() == {"code", "cause", "fix"} and not err


@pytest.mark.parametrize(
    ("problem", "code", "status"),
    [
        (LossyError("too lossy.", fix="Allow it."), "KH140", 3),
        (KeyboardInterrupt(), "KH001", 130),
        (MemoryError(), "KH200", 8),
        (OSError(28, "No space left on device", "out.safetensors"), "KH200", 8),
        (PermissionError(13, "Permission denied", "out.safetensors"), "KH200", 8),
        (FileNotFoundError(2, "No such file or directory", "x"), "KH190", 7),
        (KeyError("x"), "KH000", 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_every_exception_has_a_code_and_an_exit_status(problem, code, status):
    assert describe(problem)[0] == code and describe(problem).status == status


def test_a_bug_says_so_without_a_traceback(capsys, monkeypatch):
    monkeypatch.delenv("KRONA_TRACEBACK", raising=False)
    monkeypatch.setattr(cli, "invoke", lambda context: {}["missing"])
    assert main(["completion", "bash"]) == 1
    error = capsys.readouterr().err
    assert "This is a bug" in error and "Traceback" not in error and "KRONA_TRACEBACK=1" in error


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m krona_hub.cli completion bash | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n" and done.stderr == ""


def test_the_module_runs_like_the_command():
    done = subprocess.run([sys.executable, "-m", "krona_hub.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and "krona" in done.stdout


def test_completion_lists_commands(monkeypatch):
    words = {"_KRONA_COMPLETE": "bash_complete", "COMP_WORDS": "krona con", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "krona_hub.cli"], capture_output=True, text=True, env=words)
    assert done.stdout == "plain,convert\n"


def test_a_terminal_of_another_encoding_is_no_error():
    command = [sys.executable, "-m", "krona_hub.cli", "params", "--help"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=ascii_only)
    assert done.returncode == 0 and b"?" in done.stdout


@pytest.mark.slow
def test_a_command_says_nothing_that_torch_and_torchao_tell_developers(tmp_path):
    (tmp_path / "a.txt").write_text("a toy")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    line = ["train", "--base", "tiny-scenes", "--data", str(tmp_path), "--check", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-m", "krona_hub.cli", *line], capture_output=True, text=True, check=True)
    assert "images" in done.stdout
    assert done.stderr.splitlines() == ["Opening the base model and reading every image …"]
