"""`krona calibrate`: second moments of an adapter's layers on its base model, for smaller adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from krona_hub.cli import calibration_options as calibration
from krona_hub.cli.console import announce, emit, fields_of, krona_command, log, show_facts
from krona_hub.cli.options import base_option, component_option, file_argument, output_option, overwrite_option
from krona_hub.cli.progress import progress
from krona_hub.errors import UsageError
from krona_hub.rendering.humanize import human_bytes, percent

if TYPE_CHECKING:
    from krona_hub.calibration.report import CalibrationReport

OPTIONS = {
    "Input": (
        base_option,
        component_option,
        click.Option(
            ["--prompts"],
            metavar="FILE|default",
            default="default",
            help="Prompts with the subject, one per line, as they are used with the adapter [default].",
        ),
        *calibration.PROMPTS,
    ),
    "Sampling": calibration.SAMPLING,
    "Device and memory": (
        *calibration.MACHINE,
        click.Option(["--dtype"], metavar="TYPE", help="float32, float16 or bfloat16 [float32 on a CPU]."),
    ),
    "Output": (output_option, overwrite_option),
}


@krona_command(
    "calibrate",
    arguments=(file_argument,),
    options=OPTIONS,
    examples=("krona calibrate zorbi-lora.safetensors --base tiny-scenes --samples 300 -o moments.safetensors",),
)
def command(file: str, base: str | None, out: str | None, **options: Any) -> None:
    """Gather what the layers of an adapter see on its base model, to convert it by its effect.

    The base model with the adapter generates latents for prompts with and without the subject. At some of its steps,
    the second moments of what enters the middle of each layer, and of the gradients that reach it, are added up. `krona
    convert --moments FILE` then spends a budget where it keeps most of the effect. No images are needed. An
    interrupted calibration continues when the same command is run again.
    """
    from krona_hub.calibration.api import calibrate

    if base is None:
        raise UsageError("Missing option --base.", fix="Specify the base model, with weights: --base FOLDER.")
    if out is None:
        raise UsageError("Missing option --output.", fix="Name the file of the moments: -o moments.safetensors.")
    announce(file)
    with progress("samples") as step:
        report = calibrate(file, base, out, progress=step, **options)
    emit(fields_of(report), lambda: show(report))
    for warning in report.warnings:
        log(f"Warning: {warning}")


def show(report: CalibrationReport) -> None:
    """Show the counts, the settings and the file."""
    change = None if report.other_change is None else f"{percent(report.other_change)} of the change with the subject"
    show_facts(
        (
            ("layers", f"{report.layers:,}"),
            ("samples", f"{report.samples:,} calls of the denoiser, seed {report.seed}"),
            ("prompts", f"{len(report.prompts):,} with the subject, {len(report.other_prompts):,} without"),
            ("trajectory", f"{report.steps} steps, guidance {report.guidance}"),
            ("change without the subject", change),
            ("moments", human_bytes(report.nbytes)),
            ("time", f"{report.seconds:.0f} s"),
            ("file", str(report.out)),
        )
    )
