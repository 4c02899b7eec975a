"""`krona completion`: the script that completes commands, options, bases and formats in a shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from krona_hub.cli.console import emit, krona_command

SHELLS = {
    "bash": "~/.bashrc",
    "zsh": "~/.zshrc",
    "fish": "~/.config/fish/completions/krona.fish",
}


@krona_command(
    "completion",
    arguments=(click.Argument(["shell"], type=click.Choice(tuple(SHELLS))),),
    examples=("krona completion bash",),
)
def command(shell: str) -> None:
    """Print the script that completes krona's commands, options, base names and format names.

    Append its output to the file that your shell reads at start: ~/.bashrc, ~/.zshrc or
    ~/.config/fish/completions/krona.fish.
    """
    from krona_hub.cli.main import COMPLETE_VARIABLE, cli

    script = get_completion_class(shell)(cli, {}, "krona", COMPLETE_VARIABLE).source()  # type: ignore[misc]
    emit({"shell": shell, "file": SHELLS[shell], "script": script}, lambda: print(script))
