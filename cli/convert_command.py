"""`krona convert`: an adapter in another format, form or size, with its measured error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from krona_hub.cli.console import announce, emit, fields_of, krona_command, log, show_facts, show_table, show_text
from krona_hub.cli.options import (
    base_option,
    complete_formats,
    complete_tools,
    component_option,
    dry_run_option,
    file_argument,
    from_option,
    output_option,
    overwrite_option,
    report_option,
)
from krona_hub.cli.progress import progress
from krona_hub.errors import LossyError
from krona_hub.rendering.humanize import human_bytes, percent, relative
from krona_hub.rendering.tables import factorization_groups

if TYPE_CHECKING:
    from krona_hub.conversion import ConversionReport

FEW = 12  # layers that are listed without --layers
OPTIONS = {
    "Reading": (
        from_option,
        base_option,
        component_option,
        click.Option(
            ["--allow-missing"], is_flag=True, help="Convert what is understood, though some modules are not."
        ),
    ),
    "Where to": (
        click.Option(
            ["--to"],
            metavar="FORMAT",
            shell_complete=complete_formats,
            help="The format to write, or `lora` or `lokr`. `krona formats` lists them. Default: krona.",
        ),
        click.Option(
            ["--for", "tool"],
            metavar="TOOL",
            shell_complete=complete_tools,
            help="Target application; selects format, key names and layer shapes. A LoRA stays one without a method.",
        ),
        output_option,
        click.Option(["--dtype"], metavar="TYPE", help="Store every tensor as float32, float16 or bfloat16."),
        click.Option(["--split-qkv"], is_flag=True, help="Write fused q, k, v projections as three modules."),
        overwrite_option,
        dry_run_option,
        report_option,
    ),
    "How (at most one way)": (
        click.Option(
            ["--max-error"], type=float, metavar="E", help="The smallest form of each layer within this error [0.05]."
        ),
        click.Option(["--budget"], metavar="N|P%", help="The least error for N parameters, or P % of them."),
        click.Option(["--shape"], metavar="A1xA2", help="This size of A in every layer, by nearest Kronecker product."),
        click.Option(["--terms"], type=int, default=1, metavar="K", help="With --shape: terms per layer [1]."),
        click.Option(
            ["--shape-fallback"],
            type=click.Choice(["nearest"]),
            help="With --shape: where it does not divide a layer, take the nearest that does.",
        ),
        click.Option(["--exact"], is_flag=True, help="Equal up to rounding."),
        click.Option(["--rank"], type=int, metavar="R", help="The best LoRA of rank R, with --to lora."),
        click.Option(["--allow-loss"], is_flag=True, help="Write the result even if its total error exceeds 0.5."),
    ),
    "": (click.Option(["--layers"], is_flag=True, help="List every layer."),),
}


@krona_command(
    "convert",
    arguments=(file_argument,),
    options=OPTIONS,
    examples=(
        "krona convert lora.safetensors",
        "krona convert lora.safetensors --for comfyui --max-error 0.1",
        "krona convert lokr.safetensors --to lora --rank 16",
        "krona convert lora.safetensors --shape 64x4 --terms 8 --dry-run --allow-loss",
        "krona convert lora.safetensors --budget 50% -o half.safetensors --report half.html",
    ),
)
def command(file: str, layers: bool, report: str | None, **options: Any) -> None:
    """Write an adapter in another format, form or size.

    Without options a LoRA becomes the smallest Kronecker adapter within 5 % relative error per layer, in krona's
    own format. Give at most one way: --shape, --max-error, --budget, --exact or --rank. The report says, per layer
    and in total, what it cost; a result whose total error exceeds 0.5 is refused unless --allow-loss.
    """
    from krona_hub.conversion import convert
    from krona_hub.rendering.html.markup import check_page

    announce(file)
    if report:
        check_page(report)
    try:
        with progress("layers") as step:
            done = convert(file, progress=step, **options)
    except LossyError as refused:
        if report and refused.report:
            _say_page(report, file, refused.report, options, refused.fix)
        raise
    emit(as_document(done), lambda: show(done, every_layer=layers))
    _say_where(done)
    if report:
        _say_page(report, file, done, options)


def _say_page(page: str, file: str, report: ConversionReport, options: dict[str, Any], instead: str = "") -> None:
    """Write the page; `instead` is what a refusal advises."""
    from krona_hub.rendering.html.conversion_report import report_conversion

    log(f"page: {report_conversion(page, file, report, options, instead)}")


def as_document(report: ConversionReport) -> dict[str, Any]:
    """The report with its totals, which are computed from its layers."""
    totals = ("parameters_before", "parameters_after", "bytes_before", "bytes_after")
    measures = ("relative_error", "energy_kept", "verdict")
    computed = {name: getattr(report, name) for name in (*totals, *measures)}
    return {**fields_of(report), **computed}


def show(report: ConversionReport, *, every_layer: bool) -> None:
    """The table of layers, or of the forms they took and the worst of them; then the totals and the verdict."""
    if every_layer or len(report.layers) <= FEW:
        _show_layers(report.layers)
    else:
        _show_groups(report)
    show_text()
    show_facts(
        (
            ("total", f"{len(report.layers)} layers, {report.source_format} → {report.target_format}"),
            ("parameters", f"{report.parameters_before:,} → {report.parameters_after:,}"),
            ("bytes", f"{human_bytes(report.bytes_before)} → {human_bytes(report.bytes_after)}"),
            ("error", f"{relative(report.relative_error)} relative, {percent(report.energy_kept)} of the energy kept"),
            ("verdict", report.verdict),
            *(("also", text) for text in report.alternatives),
            *(("note", text) for text in report.notes),
            ("file", str(report.out) if report.written else None),
            ("check", report.checked.removeprefix("checked: ")),
        )
    )


def _show_layers(layers: Any) -> None:
    show_table(
        ("layer", "before", "now", ">parameters", ">error", "note"),
        ((x.layer, x.before, x.after, x.parameters_after, relative(x.relative_error), _note(x)) for x in layers),
    )


def _note(layer: Any) -> str:
    best = f"best other: {layer.best_other}" if layer.best_other else ""
    return "; ".join(filter(None, (layer.note, best)))


def _show_groups(report: ConversionReport) -> None:
    from krona_hub.conversion.report import worst_layers

    show_table(
        (">layers", "before", "now", ">parameters", ">now", ">worst error", "note"),
        (
            (g.layers, g.before, g.after, g.parameters_before, g.parameters_after, relative(g.worst_error), g.note)
            for g in factorization_groups(report.layers)
        ),
    )
    if worst := worst_layers(report.layers):
        show_text()
        rows = ((x.layer, x.after, relative(x.relative_error), x.best_other or "") for x in worst)
        show_table(("the largest errors (--layers lists all)", "now", ">error", "best other form"), rows)


def _say_where(report: ConversionReport) -> None:
    if not report.written:
        log("dry run: nothing was written.")
