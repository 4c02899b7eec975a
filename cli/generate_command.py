"""`krona generate`: pictures from a base with adapters, side by side."""

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
FEW = 12  # pictures that are listed


def complete_schedulers(_context: click.Context, _parameter: click.Parameter, start: str) -> list[str]:
    """Scheduler names for the shell; torch-free."""
    from krona_hub.images.schedulers import SAMPLERS

    return [name for name in SAMPLERS if name.startswith(start)]


def numbers(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[float, ...]:
    """`0,0.5,1` as numbers."""
    try:
        return tuple(float(word) for word in text.split(",")) if text else ()
    except ValueError:
        raise UsageError(f"{text!r} are no strengths.", fix="Give numbers: --strengths 0,0.5,1.") from None


def settings(_context: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
    """`NAME=VALUE` as an argument; the value is read as JSON where it is some."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UsageError(f"--set {text} sets nothing.", fix="Give NAME=VALUE, such as --set eta=0.5.")
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = value
    return found


OPTIONS = {
    "What to draw": (
        click.Option(
            ["-p", "--prompt", "prompts"], multiple=True, metavar="TEXT", help="What to draw; may be repeated."
        ),
        click.Option(["-n", "--negative"], metavar="TEXT", help="What not to draw."),
        click.Option(["--seed"], type=int, default=0, metavar="N", help="Of the first picture of each prompt [0]."),
        click.Option(
            ["--images-per-prompt"],
            type=int,
            metavar="N",
            help="Pictures of each prompt; seeds count up [as many as --batch].",
        ),
        click.Option(["--size"], metavar="WxH", help="In pixels [what the base was trained for]."),
        click.Option(["--steps"], type=int, metavar="N", help="Denoising steps [what the pipeline of the base takes]."),
        click.Option(
            ["--guidance"], type=float, metavar="G", help="How closely to keep to the prompt [the pipeline's]."
        ),
        click.Option(
            ["--scheduler"],
            metavar="NAME",
            shell_complete=complete_schedulers,
            help="ddim, euler, euler-a, heun, dpm++, dpm++-karras, unipc, lcm, … [the base's own].",
        ),
        click.Option(
            ["--set", "more"],
            multiple=True,
            metavar="NAME=VALUE",
            callback=settings,
            help="Any other argument of the pipeline's call, such as guidance_rescale=0.7.",
        ),
    ),
    "Adapters": (
        click.Option(
            ["-a", "--adapter", "adapters"],
            multiple=True,
            type=WeightedSource(),
            metavar="FILE[:w]",
            help="An adapter in any format, and its strength [1]. Several make a column each, beside one without.",
        ),
        click.Option(
            ["--strengths"],
            metavar="S,S,…",
            callback=numbers,
            help="A column for each strength, times the adapter's own.",
        ),
        click.Option(["--together"], is_flag=True, help="All adapters at once instead of a column each."),
        click.Option(["--compare/--no-compare"], default=None, help="With or without a column of the base alone."),
        click.Option(
            ["--beside"],
            multiple=True,
            type=click.Path(),
            metavar="BASE",
            help="A column of another base, such as a merged one.",
        ),
    ),
    "Machine": (
        click.Option(["--device"], metavar="NAME", help="cpu, cuda, cuda:1 or mps [the best there is]."),
        click.Option(
            ["--dtype"], metavar="TYPE", help="float32, float16 or bfloat16 [float32 on a CPU, else a half type]."
        ),
        click.Option(
            ["--offload"],
            metavar="HOW",
            help="model or sequential: keep in the device's memory only the part at work [none].",
        ),
        click.Option(["--tiled-vae"], is_flag=True, help="Decode in tiles: large pictures in little memory."),
        click.Option(["--batch"], type=int, default=1, metavar="N", help="Pictures computed together [1]."),
        click.Option(["--variant"], metavar="NAME", help="The variant of the base's files, such as fp16."),
        click.Option(
            ["--config"], metavar="BASE", help="For a single file: a diffusers folder of the same kind of model."
        ),
    ),
    "Where to": (
        click.Option(
            ["-o", "--output", "out"], type=click.Path(), metavar="FOLDER", help="Where to write [krona-pictures]."
        ),
        overwrite_option,
        click.Option(
            ["--again"],
            type=click.Path(),
            metavar="RECORD",
            help="Repeat a record.json or a picture; other options change it.",
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
        'krona generate base --prompt "a harbour" --adapter lora.safetensors --adapter lokr.safetensors:0.8 --dry-run',
        'krona generate base --prompt "a harbour" --adapter lora.safetensors --strengths 0,0.5,1 --dry-run',
    ),
)
def command(adapters: tuple[WeightedArgument, ...], out: str | None, show_grid: bool, **options: Any) -> None:
    """Draw pictures with a base model and adapters: numbered PNGs, a labelled grid and a record that repeats them.

    BASE is a diffusers folder, a checkpoint file, a Hub id or tiny-scenes, the small model that comes with krona.
    Adapters of any format are loaded beside its weights, on any base that diffusers draws with. Several make a grid
    with equal seeds and equal noise: base | first | second. Every PNG carries its own record.
    """
    from krona_hub.images import generate

    announce(options["base"], *(a.source for a in adapters), *options["beside"])
    with progress("steps") as step:
        report = generate(adapters=list(adapters), out=out or FOLDER, progress=step, **options)
    emit(as_document(report), lambda: show(report))
    if not report.written:
        log("dry run: nothing was written.")
    elif show_grid and report.out is not None:
        open_file(report.out / (report.grid or report.pictures[0].file))


def as_document(report: GenerateReport) -> dict[str, Any]:
    """The report without the pictures themselves."""
    hidden = ("images", "grid_image")
    return fields_of(report, without=hidden)


def show(report: GenerateReport) -> None:
    """The pictures, and where they are."""
    shown = report.pictures[:FEW]
    show_table(("picture", "prompt", ">seed", "with"), ((p.file, p.prompt, str(p.seed), p.column) for p in shown))
    if len(report.pictures) > FEW:
        show_text(f"and {len(report.pictures) - FEW} more")
    show_text()
    show_facts(_facts(report))


def _facts(report: GenerateReport) -> Iterator[tuple[str, Any]]:
    record = report.record
    yield "base", " ".join(filter(None, (record["base"]["source"], _in_brackets(record["base"]["pipeline"]))))
    yield "adapters", ", ".join(f"{a['name']} ({a['source']}:{a['weight']:g})" for a in record["adapters"])
    yield "settings", ", ".join(_settings(record))
    yield "computed", _computed(report)
    if report.written and len(report.columns) > 1:
        yield "differs", "; ".join(f"{d.second} from {d.first} {_level(d.levels)}" for d in report.differences)
    for note in report.notes:
        yield "note", note
    if report.same is not None:
        yield "again", f"{report.same} of {len(report.pictures)} pictures equal the record's, pixel by pixel"
    if report.written and report.out is not None:
        yield "grid", str(report.out / report.grid) if report.grid else None
        yield "record", str(report.out / "record.json")


def _settings(record: Any) -> Iterator[str]:
    yield f"{record['steps']} steps" if record["steps"] else "the pipeline's number of steps"
    yield record["scheduler_class"] or record["scheduler"] or "the base's scheduler"
    if record["guidance"] is not None:
        yield f"guidance {record['guidance']:g}"
    if record["size"]:
        yield "×".join(map(str, record["size"]))
    yield from (f"{name} {value}" for name, value in record["more"].items())


def _computed(report: GenerateReport) -> str | None:
    if not report.written:
        return None
    each = report.seconds / len(report.pictures)
    how = f"on {report.record['device']} in {report.record['dtype']}"
    return f"{how}, {report.seconds:.1f} s, {each:.2g} s a picture"


def _level(levels: float) -> str:
    """A mean difference of pixels, in words where there is none."""
    return "not at all" if levels == 0 else f"by {levels:.2g} of 255"


def _in_brackets(text: str | None) -> str:
    return f"({text})" if text else ""
