"""`krona extract`: an adapter from the difference between two models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from krona_hub.cli.console import announce, emit, fields_of, krona_command, log, show_facts, show_table, show_text
from krona_hub.cli.options import (
    allow_loss_option,
    complete_bases,
    component_option,
    dry_run_option,
    dtype_option,
    output_option,
    overwrite_option,
    threads_option,
    to_option,
)
from krona_hub.cli.progress import progress
from krona_hub.rendering.humanize import human_bytes, percent, relative

if TYPE_CHECKING:
    from krona_hub.extraction import ExtractedLayer, ExtractionReport
    from krona_hub.extraction.report import OtherChange

FEW = 12  # layers that are listed without --layers
WORST = 3
COMPUTED = (
    "parameters", "bytes", "dense_parameters", "relative_error", "beyond_rounding", "energy_kept", "verdict",
)  # fmt: skip


OPTIONS = {
    "Input": (
        component_option,
        click.Option(
            ["--targets"],
            metavar="SET",
            help="Adapt only these layers: a target set of `krona params` or a regular expression.",
        ),
        click.Option(
            ["--base-name"],
            metavar="NAME",
            shell_complete=complete_bases,
            help="Base model name to record in the adapter.",
        ),
        click.Option(["--also-vectors"], is_flag=True, help="Also store changes to norms and biases, as vectors."),
    ),
    "Method (choose at most one of --terms, --max-error and --budget)": (
        click.Option(
            ["--shape"],
            metavar="A1xA2",
            default="auto",
            help="Shape of A in every layer [auto: the best of all shapes].",
        ),
        click.Option(
            ["--terms"], type=int, metavar="K", help="Terms per layer, or rank of a LoRA [down to the rounding noise]."
        ),
        click.Option(
            ["--max-error"],
            type=float,
            metavar="E",
            help="Use the smallest factorization of each layer within this relative error.",
        ),
        click.Option(
            ["--budget"],
            metavar="N|P%",
            help="Minimize the error with N parameters, or a share of those of the difference, such as 1% or 1/100.",
        ),
        click.Option(
            ["--shape-fallback"],
            type=click.Choice(["nearest"]),
            help="With --shape: use the nearest valid shape for layers that it does not divide.",
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
    "": (
        threads_option,
        click.Option(["--layers"], is_flag=True, help="List every layer."),
    ),
}


@krona_command(
    "extract",
    arguments=(
        click.Argument(["base"], type=click.Path(), metavar="BASE"),
        click.Argument(["tuned"], type=click.Path(), metavar="TUNED"),
    ),
    options=OPTIONS,
    examples=(
        "krona extract base merged -o found.safetensors",
        "krona extract base merged --shape 8x8 --terms 4 --allow-loss --dry-run",
    ),
)
def command(base: str, tuned: str, out: str | None, layers: bool, **options: Any) -> None:
    """Extract the adapter that turns BASE into TUNED: Kronecker sums or a LoRA nearest to their difference.

    Both are a diffusers folder, a component folder or a checkpoint file, and their layouts and dtypes may differ. The
    difference is computed in float32, layer by layer. By default, each layer gets as many terms as rise above the
    rounding noise in TUNED. Changed norms, biases and embeddings are listed.
    """
    from krona_hub.extraction import extract

    announce(base, tuned)
    with progress("layers") as step:
        report = extract(base, tuned, out, progress=step, **options)
    emit(as_document(report), lambda: show(report, every_layer=layers))
    if not report.written:
        log("Dry run: nothing was written.")


def as_document(report: ExtractionReport) -> dict[str, Any]:
    """The report with the totals computed from its layers."""
    return {**fields_of(report), **{name: getattr(report, name) for name in COMPUTED}}


def show(report: ExtractionReport, *, every_layer: bool) -> None:
    """Show the layers, or their factorizations and the layers with the largest errors; then totals and verdict."""
    if every_layer or len(report.layers) <= FEW:
        _show_layers(report.layers, "layer")
    else:
        _show_factorizations(report.layers)
        show_text()
        worst = sorted(report.layers, key=lambda x: -x.beyond_rounding)[:WORST]
        _show_layers(worst, "largest errors (--layers lists all)")
    show_text()
    show_facts(_facts(report))


def _show_layers(layers: Any, title: str) -> None:
    show_table(
        (title, "factorization", ">parameters", ">‖Δ‖ / ‖W‖", ">error", ">beyond rounding", "note"),
        (
            (
                x.layer,
                x.form,
                x.parameters,
                *map(relative, (x.relative_norm, x.relative_error, x.beyond_rounding)),
                x.note,
            )
            for x in layers
        ),
    )


def _show_factorizations(layers: tuple[ExtractedLayer, ...]) -> None:
    """Show the layers grouped by factorization, largest group first."""
    groups: dict[str, list[ExtractedLayer]] = {}
    for layer in layers:
        groups.setdefault(layer.form, []).append(layer)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    rest = [x for _, members in ordered[FEW - 1 :] for x in members]
    if len(ordered) > FEW:
        ordered = [*ordered[: FEW - 1], (f"{len(ordered) - FEW + 1} other factorizations", rest)]
    show_table(
        (">layers", "factorization", ">parameters", ">max. error", ">beyond rounding"),
        (
            (
                len(xs), form, sum(x.parameters for x in xs),
                relative(max(x.relative_error for x in xs)), relative(max(x.beyond_rounding for x in xs)),
            )
            for form, xs in ordered
        ),
    )  # fmt: skip


def _facts(report: ExtractionReport) -> Iterator[tuple[str, Any]]:
    yield "total", f"{len(report.layers):,} layers differ, {report.unchanged:,} are equal → {report.target_format}"
    yield "only rounding", f"{len(report.at_rounding):,} layers, omitted" if report.at_rounding else None
    yield "method", report.method
    yield "parameters", f"{report.parameters:,} for {report.dense_parameters:,} changed weights"
    yield "bytes", human_bytes(report.bytes)
    yield "error", f"{relative(report.relative_error)} relative, retained energy {percent(report.energy_kept)}"
    yield "beyond rounding", f"{relative(report.beyond_rounding)}, not explained by rounding"
    yield "vectors", _captured(report)
    yield "not captured", _not_captured(report)
    yield "verdict", report.verdict
    for note in report.notes:
        yield "note", note
    yield "file", str(report.out) if report.written else None
    yield "check", report.checked.removeprefix("checked: ")


def _not_captured(report: ExtractionReport) -> str | None:
    """`changes to 12 norm, e.g. unet.conv_norm_out.weight; --also-vectors stores those of norms and biases`."""
    left = report.not_captured
    if not left:
        return None
    advice = "; --also-vectors stores those of norms and biases" if any(x.storable for x in left) else ""
    return f"changes to {_kinds(left)}, e.g. {left[0].name}{advice}"


def _captured(report: ExtractionReport) -> str | None:
    """`changes to 12 norm, 4 bias stored, 1,280 parameters`."""
    stored = report.captured
    return f"changes to {_kinds(stored)} stored, {sum(x.parameters for x in stored):,} parameters" if stored else None


def _kinds(changes: Sequence[OtherChange]) -> str:
    kinds = [x.kind for x in changes]
    return ", ".join(f"{kinds.count(kind):,} {kind}" for kind in dict.fromkeys(kinds))
