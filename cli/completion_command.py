"""`krona completion`: shell completion of commands, options, base models and formats."""

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
    """Print the shell completion script for commands, options, base models and formats.

    Append the output to the startup file of your shell: ~/.bashrc, ~/.zshrc or ~/.config/fish/completions/krona.fish.
    """
    from krona_hub.cli.main import COMPLETE_VARIABLE, cli

    script = get_completion_class(shell)(cli, {}, "krona", COMPLETE_VARIABLE).source()  # type: ignore[misc]
    emit({"shell": shell, "file": SHELLS[shell], "script": script}, lambda: print(script))
