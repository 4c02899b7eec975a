"""`krona validate`: check that a file is valid and fits its base model."""

from __future__ import annotations

import click

from krona_hub.checkpoints.findings import Finding
from krona_hub.cli.console import announce, emit, krona_command, show_text
from krona_hub.cli.options import base_option, file_argument
from krona_hub.errors import counted
from krona_hub.verification import ValidationReport, validate

COLORS = {"error": "bold red", "warning": "yellow"}


OPTIONS = (base_option,)


@krona_command(
    "validate",
    arguments=(file_argument,),
    options=OPTIONS,
    examples=("krona validate krona.safetensors", "krona validate lokr.safetensors --base sd15"),
)
@click.pass_context
def command(context: click.Context, file: str, base: str | None) -> None:
    """Check structure, schema, shapes and values of an adapter, and with --base its layers.

    Every problem is reported with its fix. The exit status is 0 for a valid file, 2 for an invalid file and 5 for a
    file that does not fit its base model. Warnings do not change the exit status.
    """
    announce(file)
    report = validate(file, base)
    emit(_document(report), lambda: _show(report))
    context.exit(report.exit_code)


def _document(report: ValidationReport) -> dict[str, object]:
    return {"path": report.path, "format": report.format, "valid": report.valid, "findings": report.findings}


def _show(report: ValidationReport) -> None:
    for finding in report.findings:
        _show_finding(finding)
    show_text(f"{report.path}: {_verdict(report)}", "" if report.valid else "bold red")


def _show_finding(finding: Finding) -> None:
    where = f"{finding.where}: " if finding.where else ""
    show_text(f"{finding.severity} {finding.code}: {where}{finding.cause}", COLORS[finding.severity])
    if finding.fix:
        show_text(f"  fix: {finding.fix}")


def _verdict(report: ValidationReport) -> str:
    """`valid`, `valid, 1 warning` or `2 errors, 1 warning`."""
    errors, warnings = len(report.errors), len(report.findings) - len(report.errors)
    counts = [counted(n, word) for n, word in ((errors, "error"), (warnings, "warning")) if n]
    return ", ".join(counts if errors else ["valid", *counts])
