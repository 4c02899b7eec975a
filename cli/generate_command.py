"""`krona generate`: images from a base model with adapters, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from krona_hub.cli.console import (
    announce,
    emit,
    fields_of,
    krona_command,
    log,
    open_file,
    show_facts,
    show_table,
    show_text,
)
from krona_hub.cli.options import dry_run_option, open_option, overwrite_option
from krona_hub.cli.progress import progress
from krona_hub.cli.weighted_source import WeightedArgument, WeightedSource
from krona_hub.errors import UsageError

if TYPE_CHECKING:
    from krona_hub.images import GenerateReport

FOLDER = "krona-pictures"
FEW = 12  # images that are listed


def complete_schedulers(_context: click.Context, _parameter: click.Parameter, start: str) -> list[str]:
    """Complete scheduler names; torch-free."""
    from krona_hub.images.schedulers import SAMPLERS

    return [name for name in SAMPLERS if name.startswith(start)]


def numbers(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[float, ...]:
    """Parse `0,0.5,1`."""
    try:
        return tuple(float(word) for word in text.split(",")) if text else ()
    except ValueError:
        raise UsageError(
            f"Invalid value {text!r} for --strengths.", fix="Use comma-separated numbers, e.g. --strengths 0,0.5,1."
        ) from None


def settings(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
    """Parse `NAME=VALUE` arguments; a value that is not valid JSON is kept as text."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UsageError(f"Invalid value {text!r} for --set.", fix="Use NAME=VALUE, e.g. --set eta=0.5.")
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = value
    return found


OPTIONS = {
    "Images": (
        click.Option(["-p", "--prompt", "prompts"], multiple=True, metavar="TEXT", help="Prompt; repeatable."),
        click.Option(["-n", "--negative"], metavar="TEXT", help="Negative prompt."),
        click.Option(
            ["--seed"], type=int, default=0, metavar="N", help="Random seed of the first image of each prompt [0]."
        ),
        click.Option(
            ["--images-per-prompt"],
            type=int,
            metavar="N",
            help="Images per prompt, with consecutive seeds [value of --batch].",
        ),
        click.Option(["--size"], metavar="WxH", help="Image size in pixels [training resolution of the base model]."),
        click.Option(["--steps"], type=int, metavar="N", help="Denoising steps [pipeline default]."),
        click.Option(["--guidance"], type=float, metavar="G", help="Guidance scale [pipeline default]."),
        click.Option(
            ["--scheduler"],
            metavar="NAME",
            shell_complete=complete_schedulers,
            help="ddim, euler, euler-a, heun, dpm++, dpm++-karras, unipc, lcm, … [scheduler of the base model].",
        ),
        click.Option(
            ["--set", "more"],
            multiple=True,
            metavar="NAME=VALUE",
            callback=settings,
            help="Additional argument of the pipeline call, e.g. guidance_rescale=0.7; repeatable.",
        ),
    ),
    "Adapters": (
        click.Option(
            ["-a", "--adapter", "adapters"],
            multiple=True,
            type=WeightedSource(),
            metavar="FILE[:w]",
            help="Adapter in any format and its strength [1]; repeatable. Several adapters get one column "
            "each, beside a column without adapters.",
        ),
        click.Option(
            ["--strengths"],
            metavar="S,S,…",
            callback=numbers,
            help="Add one column per strength; each multiplies the adapter's own strength.",
        ),
        click.Option(["--together"], is_flag=True, help="Apply all adapters at once instead of one column each."),
        click.Option(
            ["--compare/--no-compare"], default=None, help="Include or omit a column of the base model alone."
        ),
        click.Option(
            ["--beside"],
            multiple=True,
            type=click.Path(),
            metavar="BASE",
            help="Add a column of another base model, e.g. a merged one; repeatable.",
        ),
    ),
    "Device and memory": (
        click.Option(["--device"], metavar="NAME", help="cpu, cuda, cuda:1 or mps [best available]."),
        click.Option(
            ["--dtype"],
            metavar="TYPE",
            help="float32, float16 or bfloat16 [float32 on a CPU, otherwise half precision].",
        ),
        click.Option(
            ["--offload"],
            metavar="MODE",
            help="model or sequential: keep only the active part in device memory [none].",
        ),
        click.Option(["--tiled-vae"], is_flag=True, help="Decode in tiles; large images need less memory."),
        click.Option(["--batch"], type=int, default=1, metavar="N", help="Images per batch [1]."),
        click.Option(["--variant"], metavar="NAME", help="Variant of the base model files, e.g. fp16."),
        click.Option(
            ["--config"],
            metavar="BASE",
            help="For a single-file base model: a diffusers folder of the same model type.",
        ),
    ),
    "Output": (
        click.Option(["-o", "--output", "out"], type=click.Path(), metavar="FOLDER", help=f"Output folder [{FOLDER}]."),
        overwrite_option,
        click.Option(
            ["--again"],
            type=click.Path(),
            metavar="RECORD",
            help="Repeat a record.json or an image; other options override its settings.",
        ),
        open_option,
        dry_run_option,
    ),
}


@krona_command(
    "generate",
    arguments=(click.Argument(["base"], required=False, type=click.Path()),),
    options=OPTIONS,
    examples=(
        'krona generate tiny-scenes --prompt "a photo of a large red cube on a blue table"',
        'krona generate base --prompt "a harbor" --adapter lora.safetensors --adapter lokr.safetensors:0.8 --dry-run',
        'krona generate base --prompt "a harbor" --adapter lora.safetensors --strengths 0,0.5,1 --dry-run',
    ),
)
def command(adapters: tuple[WeightedArgument, ...], out: str | None, show_grid: bool, **options: Any) -> None:
    """Generate images with a base model and adapters: numbered PNGs, a labeled grid and a record to repeat them.

    BASE is a diffusers folder, a checkpoint file, a Hub id or tiny-scenes, the small model bundled with krona.
    Adapters of any format are loaded beside the weights of any base model that diffusers can generate with. Several
    adapters make a grid with equal seeds and equal noise: base | first | second. Every PNG contains its own record.
    """
    from krona_hub.images import generate

    announce(options["base"], *(a.source for a in adapters), *options["beside"])
    with progress("steps") as step:
        report = generate(adapters=list(adapters), out=out or FOLDER, progress=step, **options)
    emit(as_document(report), lambda: show(report))
    if not report.written:
        log("Dry run: nothing was written.")
    elif show_grid and report.out is not None:
        open_file(report.out / (report.grid or report.pictures[0].file))


def as_document(report: GenerateReport) -> dict[str, Any]:
    """The report without the image data."""
    hidden = ("images", "grid_image")
    return fields_of(report, without=hidden)


def show(report: GenerateReport) -> None:
    """Show the images and the paths of the grid and the record."""
    shown = report.pictures[:FEW]
    show_table(("image", "prompt", ">seed", "column"), ((p.file, p.prompt, str(p.seed), p.column) for p in shown))
    if len(report.pictures) > FEW:
        show_text(f"and {len(report.pictures) - FEW} more")
    show_text()
    show_facts(_facts(report))


def _facts(report: GenerateReport) -> Iterator[tuple[str, Any]]:
    record = report.record
    yield "base model", " ".join(filter(None, (record["base"]["source"], _in_brackets(record["base"]["pipeline"]))))
    yield "adapters", ", ".join(f"{a['name']} ({a['source']}:{a['weight']:g})" for a in record["adapters"])
    yield "settings", ", ".join(_settings(record))
    yield "computed", _computed(report)
    if report.written and len(report.columns) > 1:
        yield "differences", "; ".join(map(_difference, report.differences))
    for note in report.notes:
        yield "note", note
    if report.same is not None:
        yield "repeated", f"{report.same} of {len(report.pictures)} images match the record, pixel by pixel"
    if report.written and report.out is not None:
        yield "grid", str(report.out / report.grid) if report.grid else None
        yield "record", str(report.out / "record.json")


def _settings(record: Any) -> Iterator[str]:
    yield f"{record['steps']} steps" if record["steps"] else "default number of steps"
    yield record["scheduler_class"] or record["scheduler"] or "scheduler of the base model"
    if record["guidance"] is not None:
        yield f"guidance {record['guidance']:g}"
    if record["size"]:
        yield "×".join(map(str, record["size"]))
    yield from (f"{name} {value}" for name, value in record["more"].items())


def _computed(report: GenerateReport) -> str | None:
    if not report.written:
        return None
    per_image = report.seconds / len(report.pictures)
    how = f"on {report.record['device']} in {report.record['dtype']}"
    return f"{how}, {report.seconds:.1f} s, {per_image:.2g} s per image"


def _difference(pair: Any) -> str:
    """The mean pixel difference of two columns."""
    if pair.levels == 0:
        return f"{pair.second} equals {pair.first}"
    return f"{pair.second} differs from {pair.first} by {pair.levels:.2g} of 255"


def _in_brackets(text: str | None) -> str:
    return f"({text})" if text else ""
