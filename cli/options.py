"""Arguments and options shared by several commands, with their shell completion."""

from __future__ import annotations

import click

from krona_hub.bases.base import COMPONENTS


def complete_bases(_context: click.Context, _parameter: click.Parameter, start: str) -> list[str]:
    """Complete base model names; torch-free."""
    from krona_hub.bases.catalog import names

    return [name for name in names() if name.startswith(start)]


def complete_formats(_context: click.Context, _parameter: click.Parameter, start: str) -> list[str]:
    """Complete format names; torch-free."""
    from krona_hub.formats.known.registry import FORMATS

    return [format.name for format in FORMATS if format.name.startswith(start)]


def complete_applications(_context: click.Context, _parameter: click.Parameter, start: str) -> list[str]:
    """Complete names of target applications; torch-free."""
    from krona_hub.formats.compatibility.applications import APPLICATIONS

    return [name for name in APPLICATIONS if name.startswith(start)]


file_argument = click.Argument(["file"], type=click.Path())
base_option = click.Option(
    ["--base"],
    metavar="BASE",
    shell_complete=complete_bases,
    help="Base model: a catalog name such as sdxl, a diffusers folder or a checkpoint file.",
)
component_option = click.Option(
    ["--component"],
    metavar="NAME",
    type=click.Choice(COMPONENTS),
    help="Component of the base model that the file adapts, if the file does not record it.",
)
from_option = click.Option(
    ["--from", "from_format"],
    metavar="FORMAT",
    shell_complete=complete_formats,
    help="Format of the adapter file [detected].",
)
output_option = click.Option(["-o", "--output", "out"], type=click.Path(), metavar="OUT", help="Output path.")
overwrite_option = click.Option(["--overwrite"], is_flag=True, help="Replace the output if it exists.")
allow_missing_option = click.Option(
    ["--allow-missing"], is_flag=True, help="Continue with the recognized modules if others are not recognized."
)
allow_base_mismatch_option = click.Option(
    ["--allow-base-mismatch"], is_flag=True, help="Continue even if an adapter was made for another base model."
)
allow_loss_option = click.Option(
    ["--allow-loss"], is_flag=True, help="Write the result even if its total error exceeds 0.5."
)
dtype_option = click.Option(["--dtype"], metavar="TYPE", help="Store every tensor as float32, float16 or bfloat16.")
to_option = click.Option(
    ["--to"],
    metavar="FORMAT",
    default="krona",
    shell_complete=complete_formats,
    help="Output format: `lora`, `lokr` or a name from `krona formats` [krona].",
)
threads_option = click.Option(
    ["--threads"], type=click.IntRange(1, 64), default=2, metavar="N", help="Number of threads [2]."
)
dry_run_option = click.Option(["--dry-run"], is_flag=True, help="Show what would be done without writing files.")
report_option = click.Option(
    ["--report"], type=click.Path(dir_okay=False), metavar="FILE.html", help="Also write an HTML report."
)
open_option = click.Option(["--open", "show_grid"], is_flag=True, help="Open the grid in the system's image viewer.")
