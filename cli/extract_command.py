"""`krona extract`: an adapter from the difference of two models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from krona_hub.cli.console import announce, emit, fields_of, krona_command, log, show_facts, show_table, show_text
from krona_hub.cli.options import (
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

FEW = 12  # layers that are listed without --layers
WORST = 3
COMPUTED = (
    "parameters", "bytes", "dense_parameters", "relative_error", "beyond_rounding", "energy_kept", "verdict",
)  # fmt: skip


OPTIONS = {
    "What": (
        component_option,
        click.Option(
            ["--targets"], metavar="SET", help="Only these layers: a set of `krona params`, or a regular expression."
        ),
        click.Option(
            ["--base-name"],
            metavar="NAME",
            shell_complete=complete_bases,
            help="What the adapter shall name as its base.",
        ),
        click.Option(
            ["--also-vectors"], is_flag=True, help="Store the changes of norms and biases as well, in the extras."
        ),
    ),
    "How": (
        click.Option(
            ["--shape"], metavar="A1xA2", default="auto", help="This size of A in every layer [auto: the best of all]."
        ),
        click.Option(
            ["--terms"], type=int, metavar="K", help="Terms per layer, or the rank of a LoRA [down to the noise]."
        ),
        click.Option(
            ["--max-error"], type=float, metavar="E", help="The smallest form of each layer within this error."
        ),
        click.Option(
            ["--budget"], metavar="N|P%", help="The least error for N parameters, or P % of the difference's."
        ),
        click.Option(
            ["--shape-fallback"],
            type=click.Choice(["nearest"]),
            help="With --shape: where it does not divide a layer, take the nearest that does.",
        ),
        click.Option(["--allow-loss"], is_flag=True, help="Write the result even if its total error exceeds 0.5."),
    ),
    "Where to": (
        output_option,
        to_option,
        dtype_option,
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
    """Make the adapter that turns BASE into TUNED: the nearest Kronecker sums, or a LoRA, of their difference.

    Both are a diffusers folder, a component folder or a checkpoint file, and their layouts and types may differ. The
    difference is taken in float32, layer by layer. Without a way, each layer gets as many terms as stand above the
    noise that rounding left in TUNED. Norms, biases and embeddings that changed are listed.
    """
    from krona_hub.extraction import extract

    announce(base, tuned)
    with progress("layers") as step:
        report = extract(base, tuned, out, progress=step, **options)
    emit(as_document(report), lambda: show(report, every_layer=layers))
    if not report.written:
        log("dry run: nothing was written.")


def as_document(report: ExtractionReport) -> dict[str, Any]:
    """The report with its totals, which are computed from its layers."""
    known = fields_of(report)
    return {**known, **{name: getattr(report, name) for name in COMPUTED}}


def show(report: ExtractionReport, *, every_layer: bool) -> None:
    """The layers, or the forms they took and the worst of them; what was left; totals and verdict."""
    if every_layer or len(report.layers) <= FEW:
        _show_layers(report.layers, "layer")
    else:
        _show_forms(report.layers)
        show_text()
        worst = sorted(report.layers, key=lambda x: -x.beyond_rounding)[:WORST]
        _show_layers(worst, "the largest errors (--layers lists all)")
    show_text()
    show_facts(_facts(report))


def _show_layers(layers: Any, title: str) -> None:
    show_table(
        (title, "form", ">parameters", ">‖Δ‖ / ‖W‖", ">error", ">beyond rounding", "note"),
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


def _show_forms(layers: tuple[ExtractedLayer, ...]) -> None:
    """Layers of the same form together, most layers first."""
    groups: dict[str, list[ExtractedLayer]] = {}
    for layer in layers:
        groups.setdefault(layer.form, []).append(layer)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    rest = [x for _, members in ordered[FEW - 1 :] for x in members]
    if len(ordered) > FEW:
        ordered = [*ordered[: FEW - 1], (f"{len(ordered) - FEW + 1} other forms", rest)]
    show_table(
        (">layers", "form", ">parameters", ">worst error", ">beyond rounding"),
        (
            (
                len(xs), form, sum(x.parameters for x in xs),
                relative(max(x.relative_error for x in xs)), relative(max(x.beyond_rounding for x in xs)),
            )
            for form, xs in ordered
        ),
    )  # fmt: skip


def _facts(report: ExtractionReport) -> Iterator[tuple[str, Any]]:
    yield "total", f"{len(report.layers):,} layers differ, {report.unchanged:,} are equal, → {report.target_format}"
    yield "only rounding", f"{len(report.at_rounding):,} layers, left out" if report.at_rounding else None
    yield "method", report.method
    yield "parameters", f"{report.parameters:,} for {report.dense_parameters:,} changed numbers"
    yield "bytes", human_bytes(report.bytes)
    yield "error", f"{relative(report.relative_error)} relative, {percent(report.energy_kept)} of the energy kept"
    yield "beyond rounding", f"{relative(report.beyond_rounding)}: what rounding does not explain"
    yield "not captured", _others(report)
    yield "verdict", report.verdict
    for note in report.notes:
        yield "note", note
    yield "file", str(report.out) if report.written else None
    yield "check", report.checked.removeprefix("checked: ")


def _others(report: ExtractionReport) -> str | None:
    """`12 norms, 3 biases, such as unet.conv_norm_out.weight (--also-vectors stores them)`."""
    left = report.not_captured
    if not left:
        return None
    kinds = [x.kind for x in left]
    counts = ", ".join(f"{kinds.count(kind):,} {kind}" for kind in dict.fromkeys(kinds))
    return f"changes of {counts}, such as {left[0].name}; --also-vectors stores those of norms and biases"
