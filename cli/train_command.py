"""`krona train`: an adapter from images. Its flags are the fields of the training settings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import click

from krona_hub.cli.console import emit, flag_is_set, krona_command, log, show_facts, show_table, show_text
from krona_hub.cli.progress import noted_progress
from krona_hub.errors import UsageError, counted
from krona_hub.rendering.humanize import human_bytes
from krona_hub.training.configuration import PRESETS
from krona_hub.training.settings import KINDS, SettingKind

WORLD = "WORLD_SIZE"  # set by a launcher: this process is already one of several


def _option(kind: SettingKind) -> click.Option:
    if kind.name == "shapes":
        return click.Option([kind.flag], multiple=True, metavar="REGEX=a1xa2", help=_help(kind))
    names = ["-o", kind.flag] if kind.name == "output" else [kind.flag]
    about: dict[str, Any] = {"default": None, "help": _help(kind)}
    if kind.type is bool:
        return click.Option([f"{kind.flag}/--no-{kind.flag[2:]}", kind.name], **about)
    if kind.choices:
        return click.Option([*names, kind.name], type=click.Choice(kind.choices), **about)
    if kind.type is tuple:
        return click.Option([*names, kind.name], metavar="TEXT", multiple=True, **about)
    return click.Option([*names, kind.name], type=kind.type, metavar=_metavar(kind), **about)


def _metavar(kind: SettingKind) -> str:
    return {int: "N", float: "X"}.get(kind.type, kind.name.rsplit("_", 1)[-1].upper())


def _help(kind: SettingKind) -> str:
    shown = kind.default if isinstance(kind.default, int | float | str) and kind.default not in ("", 0, False) else None
    return kind.metadata["help"] + (f" [{shown}]" if shown is not None and kind.type is not bool else "")


OPTIONS = {
    "Run": (
        click.Option(
            ["--preset"],
            type=click.Choice(list(PRESETS)),
            help="Preset to start from; CONFIG and flags take precedence.",
        ),
        click.Option(["--resume", "resume_from"], metavar="RUN", type=click.Path(), help="Resume a stopped run."),
        click.Option(["--check"], is_flag=True, help="Check data, base model and shapes, print the plan and exit."),
        click.Option(
            ["--num-processes"], type=click.IntRange(1), metavar="N", help="Train with N processes on this machine."
        ),
    ),
    **{
        panel: tuple(_option(kind) for kind in KINDS.values() if kind.metadata["panel"] == panel)
        for panel in dict.fromkeys(kind.metadata["panel"] for kind in KINDS.values())
    },
}


@krona_command(
    "train",
    arguments=(click.Argument(["config"], required=False, type=click.Path()),),
    options=OPTIONS,
    examples=(
        'krona train --base tiny --data photos --prompt "a photo of sks toy" --steps 4 -o toy',
        "krona train config.toml --shape 8x4 --check",
        "krona train --resume stopped --steps 4",
    ),
)
def command(
    config: str | None,
    preset: str | None,
    resume_from: str | None,
    check: bool,
    num_processes: int | None,
    **flags: Any,
) -> None:
    """Train a Kronecker adapter for a base model on a folder of images.

    CONFIG is a TOML file with the same settings as the flags; flags take precedence. The run folder contains
    adapter.safetensors, checkpoints to resume from, metrics.jsonl, samples and config.toml.
    """
    given = _given(flags)
    if check and resume_from:
        raise UsageError("--check and --resume exclude each other.", fix="Remove one of them.")
    if num_processes and num_processes > 1 and WORLD not in os.environ:
        sys.stdout.flush()
        raise SystemExit(_launch(num_processes))
    if check:
        _check(config, preset, given)
    else:
        _train(config, preset, resume_from, given)


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings given on the command line."""
    given = {name: value for name, value in flags.items() if value is not None and value != ()}
    for name in given:
        if KINDS[name].has_commas:  # comma-separated, repeated, or both
            given[name] = ",".join(given[name])
    if "shapes" in given:
        given["shapes"] = dict(map(_pair, given["shapes"]))
    return given


def _pair(text: str) -> tuple[str, str]:
    pattern, equals, shape = text.rpartition("=")
    if not (equals and pattern):
        raise UsageError(
            f"Invalid value {text!r} for --shapes.", fix='Use REGEX=a1xa2, e.g. --shapes "attn2.to_[kv]=32x8".'
        )
    return pattern, shape


def _launch(processes: int) -> int:
    """Run the same command line in several processes with torchrun and return its status.

    On a CPU, `accelerate launch` starts a single process, whatever number is requested.
    """
    rest = _without(sys.argv[1:], "--num-processes")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run([*launcher, "-m", "krona_hub.cli", *rest], check=False).returncode


def _without(arguments: list[str], option: str) -> list[str]:
    """Remove an option and its value from a command line.

    >>> _without(["train", "--num-processes", "2", "--steps", "3", "--num-processes=4"], "--num-processes")
    ['train', '--steps', '3']
    """
    rest, skip = [], False
    for argument in arguments:
        if not skip and argument != option and not argument.startswith(f"{option}="):
            rest.append(argument)
        skip = argument == option
    return rest


def _train(config: str | None, preset: str | None, resume_from: str | None, given: dict[str, Any]) -> None:
    from krona_hub.training.api import train
    from krona_hub.training.progress.training_state import StepReport

    is_main = os.environ.get("RANK", "0") == "0"
    with noted_progress("training") as step:

        def show_step(now: StepReport) -> None:
            if is_main:
                step(
                    now.step,
                    now.steps,
                    f"loss {now.loss:.4f}, smoothed {now.smooth_loss:.4f}  {human_bytes(now.memory)}",
                )

        report = train(config, preset=preset, resume_from=resume_from, progress=show_step, **given)
    if is_main:
        emit(report, lambda: _show(report))


def _show(report: Any) -> None:
    show_text(f"{report.adapter}: {report.layers} layers, {report.parameters:,} parameters", "bold")
    validation = [loss for _, loss in report.validation]
    show_facts(
        [
            ("steps", report.steps),
            ("loss", f"{report.first_loss:.4f} → {report.last_loss:.4f} (smoothed)" if report.last_loss else None),
            ("validation loss", f"{validation[0]:.4f} → {validation[-1]:.4f}" if validation else None),
            ("skipped", f"{report.skipped} batches with a NaN or infinite loss" if report.skipped else None),
            ("peak memory", human_bytes(report.memory)),
            ("companion exports", ", ".join(str(path) for path in report.exports)),
        ]
    )


def _check(config: str | None, preset: str | None, given: dict[str, Any]) -> None:
    from krona_hub.training.api import check_training

    if not flag_is_set("json"):
        log("Opening the base model and reading every image …")
    plan = check_training(config, preset=preset, timed=True, **given)
    emit(plan, lambda: _show_plan(plan))


def _memory(plan: Any) -> str:
    """Memory as measured in trial steps, otherwise the part that can be computed."""
    fixed = human_bytes(plan.memory)
    if plan.peak_memory is None:
        return f"{fixed} for weights and optimizer, plus activations"
    return f"{human_bytes(plan.peak_memory)} at peak, of which {fixed} for weights and optimizer"


def _duration(seconds: float) -> str:
    """A duration in minutes or hours.

    >>> _duration(75), _duration(5400)
    ('1.2 min', '1.5 h')
    """
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _show_plan(plan: Any) -> None:
    sizes = ", ".join(f"{count} at {w}x{h}" for (w, h), count in plan.sizes)
    time = None if plan.seconds is None else f"{_duration(plan.seconds)} ({plan.seconds_per_step:.2f} s per step)"
    show_facts(
        [
            ("base model", f"{plan.base} ({plan.family}, {plan.prediction}), {plan.dtype} on {plan.device}"),
            ("images", f"{plan.pictures}: {sizes}"),
            ("unreadable images", ", ".join(plan.bad_pictures)),
            ("validation images", plan.validation_pictures or None),
            ("regularization images", plan.prior_pictures or None),
            ("layers", plan.layers),
            ("parameters", plan.parameters),
            ("steps", f"{plan.steps:,} × {counted(plan.pictures_per_step, 'image')}: {plan.epochs:.3g} epochs"),
            ("memory", _memory(plan)),
            ("time", time),
        ]
    )
    show_table(("factorization", ">layers"), plan.forms)
