"""`krona merge`: merge adapters into the weights of a base model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from krona_hub.bases.base import COMPONENTS
from krona_hub.cli.console import announce, emit, fields_of, krona_command, log, show_facts, show_table, show_text
from krona_hub.cli.options import (
    allow_base_mismatch_option,
    allow_missing_option,
    dry_run_option,
    from_option,
    output_option,
    overwrite_option,
    threads_option,
)
from krona_hub.cli.progress import byte_progress
from krona_hub.cli.weighted_source import WeightedArgument, WeightedSource
from krona_hub.errors import counted
from krona_hub.rendering.humanize import human_bytes, percent, rate

if TYPE_CHECKING:
    from krona_hub.merging.plan import AdapterPlan, MergePlan
    from krona_hub.merging.report import MergeReport

FEW = 5  # tensors that are listed without --tensors
PLANNED = (  # the options that a plan depends on
    "component", "block_weights", "out_dtype", "from_format", "allow_missing", "allow_base_mismatch",
)  # fmt: skip
COMPUTED = ("share_lost", "verdict")
OPTIONS = {
    "Input": (
        click.Option(
            ["--component"],
            metavar="NAME",
            type=click.Choice(COMPONENTS),
            help="Merge only this component; also the component of adapter files that do not record one.",
        ),
        click.Option(
            ["--block-weights"],
            type=click.Path(dir_okay=False),
            metavar="FILE",
            help="File of `regex = weight` lines (or TOML, JSON) that multiply the strength of matching layers.",
        ),
        from_option,
        allow_missing_option,
        allow_base_mismatch_option,
    ),
    "Numerics": (
        click.Option(
            ["--out-dtype"],
            type=click.Choice(("keep", "fp32-touched", "fp16", "bf16")),
            default="keep",
            help="keep: as stored; fp32-touched: changed tensors in float32; fp16, bf16: every tensor of a changed "
            "file [keep].",
        ),
        click.Option(
            ["--rounding"],
            type=click.Choice(("nearest", "stochastic")),
            default="nearest",
            help="nearest: smallest error; stochastic: preserves the strength of small deltas, with more noise "
            "[nearest].",
        ),
        click.Option(["--seed"], type=int, default=0, metavar="N", help="Random seed of stochastic rounding [0]."),
        click.Option(
            ["--exact-rounding"], is_flag=True, help="Add in float64, so that every weight is correctly rounded."
        ),
    ),
    "Output": (
        output_option,
        overwrite_option,
        click.Option(
            ["--link"], is_flag=True, help="Hard-link unchanged files; editing them later also changes the base model."
        ),
        click.Option(["--in-place"], is_flag=True, help="Modify the base model itself; requires --undo."),
        click.Option(
            ["--undo"],
            type=click.Path(),
            metavar="FILE",
            help="Write the undo file with which `krona unmerge` restores the base model.",
        ),
        click.Option(["--title"], metavar="TEXT", help="Title in the metadata of the output."),
        click.Option(
            ["--hash/--no-hash"], default=None, help="Record the SHA-256 of base model and output [if inexpensive]."
        ),
        dry_run_option,
    ),
    "": (
        threads_option,
        click.Option(["--tensors"], is_flag=True, help="List every changed tensor."),
    ),
}


@krona_command(
    "merge",
    arguments=(
        click.Argument(["base"], type=click.Path(), metavar="BASE"),
        click.Argument(["adapters"], type=WeightedSource(), nargs=-1, required=True, metavar="ADAPTER[:w]…"),
    ),
    options=OPTIONS,
    examples=(
        "krona merge base lora.safetensors:0.8 -o out",
        "krona merge base lora.safetensors:0.8 lokr.safetensors:0.5 --dry-run",
        "krona merge base lora.safetensors --in-place --undo before.safetensors",
    ),
)
def command(
    base: str,
    adapters: tuple[WeightedArgument, ...],
    out: str | None,
    block_weights: str | None,
    dry_run: bool,
    tensors: bool,
    **options: Any,
) -> None:
    """Merge adapters, each at its strength, into a base model: a diffusers folder or a checkpoint file.

    The output has the layout of the base model. Every changed weight is computed in float32 from all adapters together
    and rounded once; everything else is copied byte for byte. The result shows how much of the adapters survived
    rounding: in half precision, small deltas mostly do not. --dry-run shows the plan from headers alone.
    """
    from krona_hub.merging.block_weights import read_block_weights

    announce(base, *(adapter.source for adapter in adapters))
    options["block_weights"] = read_block_weights(block_weights) if block_weights else None
    _plan(base, adapters, options) if dry_run else _merge(base, adapters, out, options, every=tensors)


def _plan(base: str, adapters: Sequence[WeightedArgument], options: Mapping[str, Any]) -> None:
    from krona_hub.merging.plan import plan_merge

    plan = plan_merge(base, list(adapters), **{name: options[name] for name in PLANNED})
    emit(plan_document(plan), lambda: _show_plan(plan))
    log("Dry run: nothing was written.")


def _merge(
    base: str, adapters: Sequence[WeightedArgument], out: str | None, options: Mapping[str, Any], *, every: bool
) -> None:
    from krona_hub.merging.api import merge

    with byte_progress("merging") as step:
        report = merge(base, list(adapters), out, progress=step, **options)
    emit(report_document(report), lambda: _show_report(report, every))


# --- the plan --------------------------------------------------------------------------------------------------------


def plan_document(plan: MergePlan) -> dict[str, Any]:
    """The plan as plain values: changed tensors, matched modules and required resources."""
    measures = ("bytes_to_touch", "bytes_of_weights", "disk", "memory", "seconds")
    return {
        "base": plan.tree.root,
        "adapters": plan.adapters,
        "out_dtype": plan.out_dtype,
        "files": [
            {
                "path": file.path,
                "tensors": [
                    {
                        "name": t.name,
                        "dtype": t.info.dtype,
                        "out_dtype": t.out_dtype,
                        "layers": [x.layer for x in t.targets],
                    }
                    for t in file.tensors
                ],
            }
            for file in plan.files
        ],
        **{name: getattr(plan, name) for name in measures},
        "notes": plan.notes,
        "written": False,
    }


def _show_plan(plan: MergePlan) -> None:
    _show_adapters(plan.adapters)
    show_text()
    show_facts(_plan_facts(plan))


def _show_adapters(adapters: Sequence[AdapterPlan]) -> None:
    show_table(
        ("adapter", ">strength", "format", "match"),
        ((a.source, f"{a.weight:g}", a.format, a.match_summary) for a in adapters),
    )
    for adapter in adapters:
        for module, why in list(adapter.missing.items())[:FEW]:
            show_text(f"  not merged: {module}: {why}")


def _plan_facts(plan: MergePlan) -> Iterator[tuple[str, Any]]:
    stored = Counter(t.info.dtype for t in plan.tensors)
    yield "base model", f"{plan.tree.root}, {human_bytes(plan.tree.nbytes)} of weights"
    yield (
        "changes",
        (
            f"{len(plan.tensors):,} tensors in {counted(len(plan.files), 'file')}, {human_bytes(plan.bytes_to_touch)} "
            f"({percent(plan.bytes_to_touch / max(plan.tree.nbytes, 1))})"
        ),
    )
    yield "stored as", ", ".join(f"{dtype} ({n:,} tensors)" for dtype, n in stored.items())
    yield "required", f"{human_bytes(plan.disk)} of disk space, about {human_bytes(plan.memory)} of memory"
    yield "time", f"about {max(plan.seconds, 0.1):.1f} s with cached files, longer from a slow disk"
    for note in plan.notes:
        yield "note", note


# --- the result ------------------------------------------------------------------------------------------------------


def report_document(report: MergeReport) -> dict[str, Any]:
    """The report with the values computed from its tensors, and the lost share of each tensor."""
    tensors = [{**t._asdict(), "share_lost": t.share_lost} for t in report.tensors]
    computed = {name: getattr(report, name) for name in COMPUTED}
    return {**fields_of(report), **computed, "tensors": tensors, "written": True}


def _show_report(report: MergeReport, every: bool) -> None:
    _show_adapters(report.adapters)
    worst = sorted(report.tensors, key=lambda t: -t.share_lost)
    listed = report.tensors if every else worst[:FEW]
    if listed:
        show_text()
        title = "tensor" if every else "largest rounding losses (--tensors lists all)"
        show_table(
            (title, "stored as", ">‖w·ΔW‖", ">lost"),
            ((t.tensor, t.dtype, f"{t.wanted:.3g}", percent(t.share_lost)) for t in listed),
        )
    show_text()
    show_facts(_report_facts(report))


def _report_facts(report: MergeReport) -> Iterator[tuple[str, Any]]:
    changed = f"{len(report.tensors):,} tensors in {counted(len(report.files), 'file')}"
    yield "changed", f"{changed}, {human_bytes(report.bytes_touched)}"
    yield "unchanged", counted(report.copied, "file") if report.copied else None
    yield "omitted", ", ".join(report.left_out)
    yield "written", f"{human_bytes(report.bytes_written)} in {rate(report.bytes_written, report.seconds)}"
    yield "verdict", report.verdict
    for note in report.notes:
        yield "note", note
    yield "output", str(report.out)
    where = f"{report.out} --undo {report.undo}" + (" --in-place" if report.out == report.base else " -o RESTORED")
    yield "undo", f"krona unmerge {where}" if report.undo else None
