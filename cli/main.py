"""The `krona` command: a group that imports a command only when it runs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import click
import rich_click
from click.shell_completion import shell_complete

from krona_hub import __version__
from krona_hub.cli.console import log_to_stderr, silence_dependencies
from krona_hub.cli.failure_report import report_failure

COMPLETE_VARIABLE = "_KRONA_COMPLETE"
rich_click.rich_click.TEXT_PARAGRAPH_LINEBREAKS = "\n\n"
rich_click.rich_click.PADDING_HELPTEXT_FIRST_LINE = (0, 0, 1, 0)
rich_click.rich_click.MAX_WIDTH = 110
rich_click.rich_click.STYLE_EPILOG_TEXT = ""
rich_click.rich_click.COMMAND_GROUPS = {
    "krona": [
        {
            "name": "Adapters",
            "commands": ["inspect", "validate", "convert", "calibrate", "combine", "migrate", "tools"],
        },
        {"name": "Adapters and models", "commands": ["merge", "unmerge", "extract", "verify"]},
        {"name": "Training", "commands": ["train", "params", "formats", "bases"]},
        {"name": "Images", "commands": ["generate", "evaluate"]},
        {"name": "Hugging Face Hub", "commands": ["push", "pull", "hub"]},
        {"name": "Getting started", "commands": ["demo", "completion"]},
    ]
}


class CommandEntry(NamedTuple):
    """A command as `krona --help` lists it, without importing its file."""

    module: str  # exposes `command`
    summary: str


COMMANDS = {
    "inspect": CommandEntry(
        "krona_hub.cli.inspect_command", "Show what an adapter file contains and which applications load it."
    ),
    "validate": CommandEntry("krona_hub.cli.validate_command", "Check a file's structure, schema, shapes and values."),
    "convert": CommandEntry(
        "krona_hub.cli.convert_command", "Convert an adapter to another format, factorization or size."
    ),
    "calibrate": CommandEntry(
        "krona_hub.cli.calibrate_command", "Gather moments on a base model, to convert an adapter by its effect."
    ),
    "migrate": CommandEntry("krona_hub.cli.migrate_command", "Rewrite a native krona file in another schema version."),
    "merge": CommandEntry(
        "krona_hub.cli.merge_command", "Merge adapters into a base model, rounding each weight once."
    ),
    "unmerge": CommandEntry("krona_hub.cli.unmerge_command", "Restore the base model of a merge, byte for byte."),
    "extract": CommandEntry(
        "krona_hub.cli.extract_command", "Extract an adapter from the difference between two models."
    ),
    "combine": CommandEntry(
        "krona_hub.cli.combine_command", "Combine adapters, each at its strength, into one adapter."
    ),
    "verify": CommandEntry(
        "krona_hub.cli.verify_command",
        "Check a merge, compare two adapters, or check an adapter's fit to a base model.",
    ),
    "train": CommandEntry("krona_hub.cli.train_command", "Train a Kronecker adapter on images."),
    "generate": CommandEntry(
        "krona_hub.cli.generate_command", "Generate images with a base model and adapters, side by side."
    ),
    "evaluate": CommandEntry("krona_hub.cli.evaluate_command", "Score images for subject and prompt fidelity."),
    "params": CommandEntry("krona_hub.cli.params_command", "Count an adapter's parameters before training."),
    "push": CommandEntry("krona_hub.cli.push_command", "Publish an adapter on the Hugging Face Hub."),
    "pull": CommandEntry("krona_hub.cli.pull_command", "Download an adapter from the Hugging Face Hub and check it."),
    "hub": CommandEntry("krona_hub.cli.hub_command", "Show adapters on the Hub and in the local cache."),
    "formats": CommandEntry("krona_hub.cli.formats_command", "List the formats and the applications that load them."),
    "tools": CommandEntry("krona_hub.cli.tools_command", "List the applications and what they load."),
    "bases": CommandEntry("krona_hub.cli.bases_command", "List the base models that krona knows by name."),
    "demo": CommandEntry("krona_hub.cli.demo_command", "Run the main workflow offline with the bundled adapters."),
    "completion": CommandEntry("krona_hub.cli.completion_command", "Print the shell completion script."),
}


class LazyGroup(rich_click.RichGroup):
    """A group that lists its commands from COMMANDS and imports a command only to run it or show its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of the table

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, load(name) if listed else None, rest


def load(name: str) -> click.Command:
    """Import a command."""
    command: click.Command = import_module(COMMANDS[name].module).command
    return command


@click.group(
    "krona",
    cls=LazyGroup,
    commands={
        name: rich_click.RichCommand(name, short_help=entry.summary, help=entry.summary)
        for name, entry in COMMANDS.items()
    },
    context_settings={"help_option_names": ["-h", "--help"]},
    invoke_without_command=True,
)
@click.version_option(__version__, prog_name="krona")
@click.pass_context
def cli(context: click.Context) -> None:
    """Understand, convert and merge Kronecker (LoKr, KronA, DiffuseKronA) and LoRA adapters of diffusion models.

    Run krona COMMAND --help for the options of a command and an example.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def run() -> int:
    """Run the command line of this process and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without ⊗ shows a question mark instead of raising
    if instruction := os.environ.get(COMPLETE_VARIABLE):
        return shell_complete(cli, {}, "krona", COMPLETE_VARIABLE, instruction)
    return main(sys.argv[1:])


def main(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status. Failures are reported, never raised."""
    try:
        status = run_line(arguments)
        sys.stdout.flush()
    except BaseException as error:
        return report_failure(error, as_json="--json" in arguments)
    return status


def run_line(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status. Failures are raised."""
    log_to_stderr()
    silence_dependencies()
    try:
        with cli.make_context("krona", list(arguments)) as context:
            cli.invoke(context)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    return 0
