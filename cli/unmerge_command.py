"""`krona unmerge`: restore the base model of a merge, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from krona_hub.cli.console import emit, krona_command, show_facts, show_text
from krona_hub.cli.options import output_option, overwrite_option, threads_option
from krona_hub.cli.progress import byte_progress, counting
from krona_hub.errors import counted
from krona_hub.rendering.humanize import human_bytes, plain, rate

if TYPE_CHECKING:
    from krona_hub.merging.undo import UnmergeReport


OPTIONS = (
    click.Option(
        ["--undo"],
        type=click.Path(),
        required=True,
        metavar="FILE",
        help="Undo file written by `krona merge --undo FILE`.",
    ),
    output_option,
    click.Option(["--in-place"], is_flag=True, help="Restore the merged model in place."),
    overwrite_option,
    threads_option,
)


@krona_command(
    "unmerge",
    arguments=(click.Argument(["merged"], type=click.Path(), metavar="MERGED"),),
    options=OPTIONS,
    examples=(
        "krona unmerge merged --undo undo.safetensors -o restored",
        "krona unmerge merged --undo undo.safetensors --in-place",
    ),
)
def command(merged: str, undo: str, out: str | None, **options: Any) -> None:
    """Restore the base model of a merge, byte for byte.

    The undo file contains the original values of every changed tensor, since subtracting an adapter from rounded
    weights does not restore them. A model that is not the result of this merge is refused. MERGED may also be a base
    model that an interrupted merge --in-place left partially merged.
    """
    from krona_hub.merging.undo import unmerge

    with byte_progress("restoring") as step:
        report = unmerge(merged, undo, out, progress=counting(step), **options)
    emit(plain(report), lambda: _show(report))


def _show(report: UnmergeReport) -> None:
    show_facts(_facts(report))
    show_text("Restored: every file has the SHA-256 of the base model.", "bold green")


def _facts(report: UnmergeReport) -> Iterator[tuple[str, Any]]:
    yield "restored", counted(len(report.restored), "file")
    yield "unchanged", counted(len(report.unchanged), "file") if report.unchanged else None
    yield "copied", counted(len(report.copied), "file") if report.copied else None
    yield "output", report.out
    yield "written", f"{human_bytes(report.nbytes)} in {rate(report.nbytes, report.seconds)}"
