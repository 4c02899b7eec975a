"""`krona pull`: an adapter from the Hugging Face Hub, checked."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from krona_hub.cli.console import emit, fields_of, krona_command, log, show_facts
from krona_hub.cli.options import dry_run_option, output_option, overwrite_option
from krona_hub.errors import UsageError
from krona_hub.hub.preview import describe_preview
from krona_hub.rendering.humanize import human_bytes

if TYPE_CHECKING:
    from krona_hub.hub import PullReport

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


OPTIONS = (
    output_option,
    click.Option(["--offline"], is_flag=True, help="Use the copy in the cache, and ask nobody."),
    click.Option(["--expect-sha"], metavar="SHA256", help="Refuse weights with another sha256."),
    click.Option(["--verify-key"], type=click.Path(), metavar="PEM", help="Check the signature with this public key."),
    click.Option(["--max-size"], default="2G", metavar="SIZE", help="Refuse larger files, such as 500M [2G]."),
    click.Option(["--endpoint"], metavar="URL", help="The address of another Hub [HF_ENDPOINT]."),
    overwrite_option,
    dry_run_option,
)


@krona_command(
    "pull",
    arguments=(click.Argument(["source"], metavar="REPO[@REV][/FILE]"),),
    options=OPTIONS,
    examples=(
        "krona pull ana/style",
        "krona pull ana/style@v1/krona_adapter.safetensors -o style.safetensors",
        "krona pull ana/style --dry-run",
    ),
)
def command(source: str, max_size: str, dry_run: bool, **options: Any) -> None:
    """Download an adapter from the Hugging Face Hub.

    Shows what it is before any weight is fetched, takes only files that belong to an adapter, compares them with the
    digests of the Hub and of the manifest, checks structure and numbers, and puts them in place whole.
    """
    from krona_hub.hub import pull

    report = pull(source, max_size=bytes_of(max_size), dry_run=dry_run, **options)
    for note in report.notes:
        log(note)
    emit(as_document(report), lambda: show(report))
    if dry_run:
        log("dry run: no weights were downloaded.")


def bytes_of(text: str) -> int:
    """A size that a person writes: 2G, 500M, 1000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", text.strip().lower())
    if not found:
        raise UsageError(f"{text!r} is no size.", fix="Write 500M or 2G.")
    return int(float(found[1]) * UNITS[found[2]])


def as_document(report: PullReport) -> dict[str, Any]:
    fields = fields_of(report, without=("preview",))
    return {**fields, "native": report.native, "preview": describe_preview(report.preview)}


def show(report: PullReport) -> None:
    about = describe_preview(report.preview)
    show_facts(
        (
            ("repository", report.repo),
            ("commit", report.commit),
            ("format", about["format"]),
            ("base", about["base"]),
            ("layers", about["layers"]),
            ("parameters", about["parameters"]),
            ("trigger words", ", ".join(about["trigger_words"])),
            ("files", f"{len(report.files)}, {human_bytes(report.bytes)}"),
            ("left out", f"{len(report.skipped)}: {', '.join(report.skipped[:4])}" if report.skipped else None),
            ("sha256", report.sha256),
            ("output", str(report.out) if report.written else None),
            ("next", report.next if report.written else None),
        )
    )
