"""`krona combine`: the weighted sum of several adapters as one adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from krona_hub.cli.console import announce, emit, fields_of, krona_command, log, show_facts, show_table, show_text
from krona_hub.cli.options import (
    allow_base_mismatch_option,
    allow_loss_option,
    allow_missing_option,
    base_option,
    component_option,
    dry_run_option,
    dtype_option,
    output_option,
    overwrite_option,
    to_option,
)
from krona_hub.cli.progress import progress
from krona_hub.cli.weighted_source import WeightedArgument, WeightedSource
from krona_hub.rendering.humanize import human_bytes, percent, relative
from krona_hub.rendering.tables import factorization_groups

if TYPE_CHECKING:
    from krona_hub.combining import CombineReport


OPTIONS = {
    "Input": (
        base_option,
        component_option,
        allow_missing_option,
        allow_base_mismatch_option,
    ),
    "Size reduction (choose at most one)": (
        click.Option(["--terms"], type=int, metavar="K", help="Keep the best K terms in the shape of each layer."),
        click.Option(
            ["--max-error"],
            type=float,
            metavar="E",
            help="Use the smallest factorization of each layer within this relative error.",
        ),
    ),
    "Output": (
        output_option,
        to_option,
        dtype_option,
        allow_loss_option,
        overwrite_option,
        dry_run_option,
    ),
    "": (click.Option(["--layers"], is_flag=True, help="List every layer."),),
}


@krona_command(
    "combine",
    arguments=(click.Argument(["adapters"], type=WeightedSource(), nargs=-1, required=True, metavar="ADAPTER[:w]…"),),
    options=OPTIONS,
    examples=(
        "krona combine lora.safetensors:0.7 lokr.safetensors:0.3 -o both.safetensors",
        "krona combine lora.safetensors lokr.safetensors:-0.5 --max-error 0.05 -o small.safetensors",
    ),
)
def command(
    adapters: tuple[WeightedArgument, ...], layers: bool, dry_run: bool, out: str | None, **options: Any
) -> None:
    """Combine adapters, each at its strength, into one adapter.

    The sum is exact: the factors of all adapters are concatenated, not averaged. The strengths (FILE:w, default 1) are
    folded in, so that the result is used at strength 1. --terms and --max-error reduce its size afterwards and report
    the measured error. Without --output, the result is reported but not written.
    """
    from krona_hub.combining import combine

    announce(*(adapter.source for adapter in adapters))
    with progress("layers") as step:
        report = combine(list(adapters), out, dry_run=dry_run, progress=step, **options)
    emit(as_document(report), lambda: show(report, every_layer=layers))
    if not report.written:
        log("Dry run: nothing was written." if dry_run else "No --output given: nothing was written.")


def as_document(report: CombineReport) -> dict[str, Any]:
    """The report with the totals computed from its layers."""
    totals = ("parameters_before", "parameters_after", "bytes_before", "bytes_after")
    measures = ("relative_error", "energy_kept", "verdict")
    computed = {name: getattr(report, name) for name in (*totals, *measures)}
    return {**fields_of(report), **computed}


def show(report: CombineReport, *, every_layer: bool) -> None:
    """Show the parts, the factorizations of the sum, the totals and the verdict."""
    show_table(
        ("adapter", ">strength", "format", ">layers", ">parameters"),
        ((p.source, f"{p.weight:g}", p.format, p.layers, p.parameters) for p in report.parts),
    )
    show_text()
    _show_layers(report) if every_layer else _show_groups(report)
    show_text()
    show_facts(_facts(report))


def _show_layers(report: CombineReport) -> None:
    show_table(
        ("layer", "sum", "new factorization", ">parameters", ">error"),
        ((x.layer, x.before, x.after, x.parameters_after, relative(x.relative_error)) for x in report.layers),
    )


def _show_groups(report: CombineReport) -> None:
    groups = factorization_groups(report.layers)
    if all(x.before == x.after for x in report.layers):
        show_table(
            (">layers", "factorization", ">parameters"), ((g.layers, g.before, g.parameters_after) for g in groups)
        )
        return
    show_table(
        (">layers", "sum", "new factorization", ">parameters", ">new parameters", ">max. error"),
        (
            (g.layers, g.before, g.after, g.parameters_before, g.parameters_after, relative(g.worst_error))
            for g in groups
        ),
    )


def _facts(report: CombineReport) -> Iterator[tuple[str, Any]]:
    yield "total", f"{len(report.layers)} layers, {report.target_format}"
    yield "vectors", f"{len(report.vectors):,}, {report.vector_parameters:,} parameters" if report.vectors else None
    yield "parameters", f"{report.parameters_before:,} → {report.parameters_after:,}"
    yield "bytes", f"{human_bytes(report.bytes_before)} → {human_bytes(report.bytes_after)}"
    yield "error", f"{relative(report.relative_error)} relative, retained energy {percent(report.energy_kept)}"
    yield "verdict", report.verdict
    for note in report.notes:
        yield "note", note
    yield "file", str(report.out) if report.written else None
    yield "check", report.checked.removeprefix("checked: ")
    if report.written and report.target_format == "krona":
        yield "next", f"krona convert {report.out} --for APPLICATION writes a file that APPLICATION loads"
