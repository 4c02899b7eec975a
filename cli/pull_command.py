"""`krona pull`: download and check an adapter from the Hugging Face Hub."""

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
    click.Option(["--offline"], is_flag=True, help="Use the cached copy without network access."),
    click.Option(["--expect-sha"], metavar="SHA256", help="Refuse weights with a different SHA-256."),
    click.Option(["--verify-key"], type=click.Path(), metavar="PEM", help="Check the signature with this public key."),
    click.Option(["--max-size"], default="2G", metavar="SIZE", help="Refuse files larger than SIZE, e.g. 500M [2G]."),
    click.Option(["--endpoint"], metavar="URL", help="URL of another Hub [HF_ENDPOINT]."),
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
    """Download an adapter from the Hugging Face Hub and check it.

    Describes the adapter before any weights are downloaded, downloads only files that belong to an adapter, compares
    them with the digests of the Hub and of the manifest, checks structure and values, and moves only complete files
    into place.
    """
    from krona_hub.hub import pull

    report = pull(source, max_size=bytes_of(max_size), dry_run=dry_run, **options)
    for note in report.notes:
        log(note)
    emit(as_document(report), lambda: show(report))
    if dry_run:
        log("Dry run: no weights were downloaded.")


def bytes_of(text: str) -> int:
    """Parse a size such as 2G, 500M or 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", text.strip().lower())
    if not match:
        raise UsageError(f"Invalid size {text!r}.", fix="Use a size such as 500M or 2G.")
    return int(float(match[1]) * UNITS[match[2]])


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
            ("base model", about["base"]),
            ("layers", about["layers"]),
            ("parameters", about["parameters"]),
            ("trigger words", ", ".join(about["trigger_words"])),
            ("files", f"{len(report.files)}, {human_bytes(report.bytes)}"),
            ("skipped", f"{len(report.skipped)}: {', '.join(report.skipped[:4])}" if report.skipped else None),
            ("sha256", report.sha256),
            ("output", str(report.out) if report.written else None),
            ("next", report.next if report.written else None),
        )
    )
