"""`krona convert`: an adapter in another format, factorization or size, with its measured error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from krona_hub.cli import calibration_options as calibration
from krona_hub.cli.console import announce, emit, fields_of, krona_command, log, show_facts, show_table, show_text
from krona_hub.cli.options import (
    allow_loss_option,
    base_option,
    complete_applications,
    complete_formats,
    component_option,
    dry_run_option,
    file_argument,
    from_option,
    output_option,
    overwrite_option,
    report_option,
)
from krona_hub.cli.progress import progress
from krona_hub.errors import LossyError, UsageError, counted
from krona_hub.rendering.humanize import human_bytes, percent, relative
from krona_hub.rendering.tables import factorization_groups

if TYPE_CHECKING:
    from krona_hub.conversion import ConversionReport

FEW = 12  # layers that are listed without --layers
OPTIONS = {
    "Input": (
        from_option,
        base_option,
        component_option,
        click.Option(
            ["--allow-missing"],
            is_flag=True,
            help="Leave out what is not recognized, and what the target has no place for.",
        ),
    ),
    "Output": (
        click.Option(
            ["--to"],
            metavar="FORMAT",
            shell_complete=complete_formats,
            help="Output format: `lora`, `lokr` or a name from `krona formats` [krona].",
        ),
        click.Option(
            ["--for", "tool"],
            metavar="APPLICATION",
            shell_complete=complete_applications,
            help="Target application; selects format, key names and layer shapes. A LoRA stays a LoRA unless a method "
            "is chosen.",
        ),
        output_option,
        click.Option(["--dtype"], metavar="TYPE", help="Store every tensor as float32, float16 or bfloat16."),
        click.Option(["--split-qkv"], is_flag=True, help="Write fused q, k, v projections as three modules."),
        allow_loss_option,
        overwrite_option,
        dry_run_option,
        report_option,
    ),
    "Method (choose at most one)": (
        click.Option(
            ["--max-error"],
            type=float,
            metavar="E",
            help="Use the smallest factorization of each layer within this relative error [0.05].",
        ),
        click.Option(
            ["--budget"],
            metavar="N|P%",
            help="Minimize the error with N parameters, or a share of the original number, such as 50% or 1/8. Layers "
            "may be left out.",
        ),
        click.Option(
            ["--shape"], metavar="A1xA2", help="Use the nearest Kronecker product with this shape of A in every layer."
        ),
        click.Option(
            ["--terms"], type=int, default=1, metavar="K", help="With --shape: number of terms per layer [1]."
        ),
        click.Option(
            ["--shape-fallback"],
            type=click.Choice(["nearest"]),
            help="With --shape: use the nearest valid shape for layers that it does not divide.",
        ),
        click.Option(["--exact"], is_flag=True, help="Convert exactly, up to rounding."),
        click.Option(["--rank"], type=int, metavar="R", help="With --to lora: the best LoRA of rank R."),
    ),
    "Calibration, with --budget, --rank or --max-error": (
        click.Option(
            ["--calibrate", "prompts"],
            metavar="FILE|default",
            help="Keep the effect instead of the energy: gather moments with these prompts on the base model, fit a "
            "common gain, and measure the effect on held-out prompts.",
        ),
        click.Option(
            ["--moments"],
            type=click.Path(),
            metavar="FILE",
            help="Moments of `krona calibrate`; with --calibrate, written if the file does not exist.",
        ),
        *calibration.PROMPTS,
        *calibration.SAMPLING,
        click.Option(["--no-gain"], is_flag=True, help="Do not fit a gain."),
        click.Option(["--no-comparison"], is_flag=True, help="Do not measure a plain cut and a Kronecker sum."),
        *calibration.MACHINE,
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
        "krona convert zorbi-lora.safetensors --base tiny-scenes --budget 1/8 --calibrate default -o out.safetensors",
    ),
)
def command(
    file: str, layers: bool, report: str | None, prompts: str | None, moments: str | None, **options: Any
) -> None:
    """Convert an adapter to another format, factorization or size.

    By default, a LoRA becomes the smallest Kronecker adapter within 5 % relative error per layer, in the native krona
    format. Choose at most one method: --shape, --max-error, --budget, --exact or --rank. The error is reported per
    layer and in total. A total error above 0.5 is refused without --allow-loss, except with --budget and --rank, whose
    size you choose: the verdict then rates the loss.

    With --calibrate or --moments, --budget, --rank and --max-error keep the effect on the base model's output instead
    of the energy: every layer becomes the LoRA of the rank that the effect asks for, or is left out. The verdict is
    then by the effect that was measured on held-out prompts.
    """
    from krona_hub.rendering.html.markup import check_html_path

    announce(file)
    if report:
        check_html_path(report)
    try:
        done = _converted(file, prompts, moments, options)
    except LossyError as refused:
        if report and refused.report:
            _write_report(report, file, refused.report, options, refused.fix)
        raise
    emit(as_document(done), lambda: show(done, every_layer=layers))
    _log_dry_run(done)
    if report:
        _write_report(report, file, done, options)


def _converted(file: str, prompts: str | None, moments: str | None, options: dict[str, Any]) -> ConversionReport:
    """Convert, by moments if prompts or a file of moments are given; remove the options of a calibration."""
    names = {
        name for option in (*calibration.PROMPTS, *calibration.SAMPLING, *calibration.MACHINE) for name in [option.name]
    }
    own = {name: options.pop(name) for name in [*options] if name in names}
    fit_gain, compare = not options.pop("no_gain"), not options.pop("no_comparison")
    if prompts is None:
        _check_unused(own, fit_gain=fit_gain, compare=compare)
    if prompts is None and moments is None:
        from krona_hub.conversion import convert

        with progress("layers") as step:
            return convert(file, progress=step, **options)
    from krona_hub.calibration.api import convert_calibrated

    with progress("samples") as step:
        return convert_calibrated(
            file, prompts=prompts, moments=moments, fit_gain=fit_gain, compare=compare, progress=step, **own, **options
        ).conversion


def _check_unused(own: Mapping[str, Any], **flags: bool) -> None:
    """Raise UsageError for an option of a calibration without --calibrate, which would have no effect."""
    declared = (*calibration.PROMPTS, *calibration.SAMPLING, *calibration.MACHINE)
    given = [max(o.opts, key=len) for o in declared if own[str(o.name)] not in (None, o.default)]
    given += [flag for flag, name in (("--no-gain", "fit_gain"), ("--no-comparison", "compare")) if not flags[name]]
    if given:
        raise UsageError(f"{given[0]} requires --calibrate.", fix="Add --calibrate default, or a file of prompts.")


def _write_report(path: str, file: str, report: ConversionReport, options: dict[str, Any], advice: str = "") -> None:
    """Write the HTML report; `advice` is the fix of a refused conversion."""
    from krona_hub.rendering.html.conversion_report import report_conversion

    log(f"Report: {report_conversion(path, file, report, options, advice)}")


def as_document(report: ConversionReport) -> dict[str, Any]:
    """The report with the totals computed from its layers."""
    totals = ("parameters_before", "parameters_after", "bytes_before", "bytes_after")
    measures = ("layers_left_out", "relative_error", "energy_kept", "verdict")
    computed = {name: getattr(report, name) for name in (*totals, *measures)}
    return {**fields_of(report), **computed}


def show(report: ConversionReport, *, every_layer: bool) -> None:
    """Show the layers, or their factorizations and the layers with the largest errors; then totals and verdict."""
    if every_layer or len(report.layers) <= FEW:
        _show_layers(report.layers)
    else:
        _show_groups(report)
    layers = f"{counted(len(report.layers), 'layer')}{report.kept_and_left_out}"
    show_text()
    show_facts(
        (
            ("total", f"{layers}, {report.source_format} → {report.target_format}"),
            ("parameters", f"{report.parameters_before:,} → {report.parameters_after:,}"),
            ("vectors", f"{report.vectors:,}, {report.vector_parameters:,} parameters" if report.vectors else None),
            ("bytes", f"{human_bytes(report.bytes_before)} → {human_bytes(report.bytes_after)}"),
            *_effect_facts(report),
            ("error", f"{relative(report.relative_error)} relative, retained energy {percent(report.energy_kept)}"),
            ("verdict", report.verdict),
            *(("alternative", text) for text in report.alternatives),
            *(("note", text) for text in report.notes),
            ("file", str(report.out) if report.written else None),
            ("check", report.checked.removeprefix("checked: ")),
        )
    )


def _effect_facts(report: ConversionReport) -> Iterator[tuple[str, str]]:
    """Yield the predicted and the measured effect, if the conversion used moments."""
    from krona_hub.conversion.report import percent as share

    if report.predicted_effect is None:
        return
    yield "predicted effect", f"{share(report.predicted_effect)} kept, by the moments"
    effect = report.effect
    if effect is None:
        return
    low, high = effect.kept_range
    yield (
        "measured effect",
        f"{share(effect.kept)} kept, 95 % range {share(low)} to {share(high)}, on {len(effect.prompts)} held-out "
        f"prompts, {effect.samples} samples, seed {effect.seed}",
    )
    yield "strength", f"{effect.strength:.2f} of the original along its effect, with gain {report.gain:g}"
    if effect.other_kept is not None:
        yield (
            "other prompts",
            f"{share(effect.other_kept)} kept on {len(effect.other_prompts)} prompts without the subject; change "
            f"{effect.drift:.2f} of that of the original",
        )


def _show_layers(layers: Any) -> None:
    show_table(
        ("layer", "original", "new factorization", ">parameters", ">error", "note"),
        ((x.layer, x.before, x.after, x.parameters_after, relative(x.relative_error), _note(x)) for x in layers),
    )


def _note(layer: Any) -> str:
    best = f"best alternative: {layer.best_other}" if layer.best_other else ""
    return "; ".join(filter(None, (layer.note, best)))


def _show_groups(report: ConversionReport) -> None:
    from krona_hub.conversion.report import worst_layers

    show_table(
        (">layers", "original", "new factorization", ">parameters", ">new parameters", ">max. error", "note"),
        (
            (g.layers, g.before, g.after, g.parameters_before, g.parameters_after, relative(g.worst_error), g.note)
            for g in factorization_groups(report.layers)
        ),
    )
    if worst := worst_layers(report.layers):
        show_text()
        rows = ((x.layer, x.after, relative(x.relative_error), x.best_other or "") for x in worst)
        which = "kept layers with the largest errors" if report.layers_left_out else "largest errors"
        show_table((f"{which} (--layers lists all)", "new factorization", ">error", "best alternative"), rows)


def _log_dry_run(report: ConversionReport) -> None:
    if not report.written:
        log("Dry run: nothing was written.")
