"""`krona verify`: check a merge, compare two adapters, or check an adapter's fit to a base model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from krona_hub.cli.console import announce, emit, krona_command, show_facts, show_table, show_text
from krona_hub.cli.options import allow_missing_option, base_option, component_option
from krona_hub.cli.progress import byte_progress, progress
from krona_hub.cli.weighted_source import WeightedArgument, WeightedSource
from krona_hub.errors import counted
from krona_hub.rendering.humanize import plain, relative

if TYPE_CHECKING:
    from krona_hub.verification import DeltaCheck, FitCheck, MergeCheck, VerifyReport

FEW = 6  # rows that are listed without --all
PARALLEL = 0.99  # cosine from which one delta counts as a multiple of the other
STATES = {  # states whose name in the report, frozen for --json, differs from the one on the screen
    "other strength": "different strength", "rounded otherwise": "rounding difference",
    "other shape": "different shape", "touched": "changed unexpectedly",
}  # fmt: skip
PROPERTIES = ("same", "exit_code", "states", "only_first", "only_second", "relative_difference")


OPTIONS = {
    "Input": (
        base_option,
        click.Option(
            ["--adapter", "adapters"],
            type=WeightedSource(),
            multiple=True,
            metavar="FILE[:w]",
            help="With --base: adapter that FILE should contain at strength w; repeatable.",
        ),
    ),
    "Comparison": (
        component_option,
        click.Option(
            ["--tolerance"],
            type=float,
            default=1e-5,
            metavar="E",
            help="Relative tolerance per layer between two adapters [1e-05].",
        ),
        click.Option(["--exact"], is_flag=True, help="Require exact equality of a merged model instead of 1 ULP."),
        allow_missing_option,
        click.Option(["--all", "every"], is_flag=True, help="List everything, not only the largest differences."),
    ),
}


@krona_command(
    "verify",
    arguments=(
        click.Argument(["first"], type=click.Path(), metavar="FILE"),
        click.Argument(["second"], type=click.Path(), required=False, metavar="[ADAPTER]"),
    ),
    options=OPTIONS,
    examples=(
        "krona verify merged --base base --adapter lora.safetensors:0.8",
        "krona verify lokr.safetensors krona.safetensors",
        "krona verify lokr.safetensors --base sd15",
    ),
)
@click.pass_context
def command(
    context: click.Context,
    first: str,
    second: str | None,
    adapters: tuple[WeightedArgument, ...],
    every: bool,
    **options: Any,
) -> None:
    """Check a merge, compare two adapters, or check an adapter's fit to a base model.

    `krona verify MERGED --base BASE --adapter A:w` checks that MERGED equals BASE with A at strength w.

    `krona verify A B` checks that two adapters represent the same ΔW.

    `krona verify A --base BASE` checks, from headers alone, that the adapter fits the base model.

    The exit status is 0 for a match, 6 for a difference and 5 for an adapter that does not fit its base model.
    """
    from krona_hub.verification import verify

    announce(first, second, *(adapter.source for adapter in adapters))
    bar = byte_progress if adapters else progress
    with bar("comparing") as step:
        report = verify(first, second, adapters=list(adapters), progress=step, **options)
    emit(as_document(report), lambda: show(report, every=every))
    context.exit(report.exit_code)


def as_document(report: VerifyReport) -> dict[str, Any]:
    """The report with the values computed from it."""
    return plain(report) | {name: getattr(report, name) for name in PROPERTIES if hasattr(report, name)}


def show(report: VerifyReport, *, every: bool) -> None:
    """Show the differences, largest first; then the measures and the verdict."""
    _SHOW[report.question](report, every)


def _show_rows(columns: Sequence[str], rows: Sequence[Sequence[Any]], every: bool) -> None:
    """Show a table of differences, cut to FEW rows unless --all was given."""
    if rows:
        show_table(columns, rows if every else rows[:FEW])
        if not every and len(rows) > FEW:
            show_text(f"and {len(rows) - FEW:,} more (--all lists them)")
        show_text()


def _verdict(same: bool, match: str, mismatch: str) -> tuple[str, Any]:
    """The last line, in color in a terminal."""
    from rich.text import Text

    return "verdict", Text(match if same else mismatch, "bold green" if same else "bold red")


# --- a merged model and its adapters ---------------------------------------------------------------------------------


def _show_merge(report: MergeCheck, every: bool) -> None:
    _show_rows(
        ("tensor", "state", ">elements", ">unequal", ">max. ULP error", ">strength"),
        [
            (t.tensor, _state(t.state), t.elements, t.unequal, f"{t.worst_units:.3g}", _strengths(t.strengths))
            for t in (report.tensors if every else report.different)
        ],
        every,
    )
    show_facts(_merge_facts(report))


def _merge_facts(report: MergeCheck) -> Iterator[tuple[str, Any]]:
    for adapter, weight, matched in zip(report.adapters, report.weights, report.matched, strict=True):
        yield "adapter", f"{adapter} at {weight:g}, {matched}"
    yield "tensors", ", ".join(f"{count:,} {_state(state)}" for state, count in report.states.items())
    yield "measured strength", _strengths(report.strengths)
    for note in report.notes:
        yield "note", note
    yield _verdict(report.same, _merged(report), _not_merged(report))


def _merged(report: MergeCheck) -> str:
    touched = sum(t.touched for t in report.tensors)
    return (
        f"Match: the model equals base + adapters (within 1 ULP). {touched:,} tensors are the rounded sum; "
        f"{len(report.tensors) - touched:,} are unchanged.{_not_compared(report)}"
    )


def _not_compared(report: MergeCheck | DeltaCheck) -> str:
    count = len(report.skipped)
    return f" {counted(count, 'part')} of the files {'was' if count == 1 else 'were'} not compared." if count else ""


def _not_merged(report: MergeCheck) -> str:
    """The most specific description that holds for all differences."""
    count = f"{len(report.different):,} of {len(report.tensors):,} tensors"
    states = {t.state for t in report.different}
    if states == {"not merged"}:
        return f"Mismatch: nothing was merged into {count}."
    if states == {"other strength"} and len(report.strengths) == 1:
        return f"Mismatch: merged at {_strengths(report.strengths)}, not at {report.weights[0]:g}."
    return f"Mismatch: {count} differ from base + adapters."


def _state(state: str) -> str:
    """The state of a tensor as the tables show it."""
    return STATES.get(state, state)


def _strengths(values: tuple[float, ...]) -> str | None:
    return ", ".join(f"{v:.4g}" for v in values) or None


# --- two adapters ----------------------------------------------------------------------------------------------------


def _show_delta(report: DeltaCheck, every: bool) -> None:
    worst = sorted(report.different, key=lambda x: -x.relative_difference)
    listed = report.compared if every else worst
    rows = [(x.layer, x.first, x.second, relative(x.relative_difference)) for x in listed]
    _show_rows(("layer", "first", "second", ">relative difference"), rows, every)
    show_facts(_delta_facts(report))


def _delta_facts(report: DeltaCheck) -> Iterator[tuple[str, Any]]:
    yield "first", f"{report.first} ({report.formats[0]})"
    yield "second", f"{report.second} ({report.formats[1]})"
    yield "layers", len(report.layers)
    yield "vectors", len(report.vectors) or None
    yield "only in the first", len(report.only_first) or None
    yield "only in the second", len(report.only_second) or None
    everything = "layers and vectors" if report.vectors else "layers"
    yield "difference", f"{relative(report.relative_difference)} relative, over all {everything}"
    if report.scale is not None and report.cosine is not None:
        parallel = abs(report.cosine) > PARALLEL
        words = f"about {report.scale:.4g}× the first" if parallel else "not a multiple of the first"
        yield "the second is", f"{words}, cosine {report.cosine:.4f}"
    for note in report.notes:
        yield "note", note
    yield _verdict(
        report.same,
        f"Match: both represent the same ΔW, within {report.tolerance:g} in each of {_compared(report)}."
        f"{_not_compared(report)}",
        f"Mismatch: {len(report.different):,} of the {_compared(report)} differ by over {report.tolerance:g}.",
    )


def _compared(report: DeltaCheck) -> str:
    """`56 layers and 4 vectors`; without the vectors if there are none."""
    vectors = f" and {counted(len(report.vectors), 'vector')}" if report.vectors else ""
    return f"{counted(len(report.layers), 'layer')}{vectors}"


# --- an adapter and its base model -----------------------------------------------------------------------------------


def _show_fit(report: FitCheck, every: bool) -> None:
    _show_rows(("module", "reason for the mismatch"), list(report.problems.items()), every)
    show_facts(_fit_facts(report))


def _fit_facts(report: FitCheck) -> Iterator[tuple[str, Any]]:
    yield "modules", f"{report.matched} of {report.total} modules match a layer and its shape in {report.base}"
    if report.total_vectors:
        yield "vectors", f"{report.matched_vectors} of {report.total_vectors} vectors match a parameter"
    yield "layers", ", ".join(f"{part} {done:,} of {of:,}" for part, (done, of) in report.coverage.items())
    yield "recorded base model", report.recorded
    if report.fingerprint_agrees is False:
        yield "fingerprint", "the file records a different base model"
    yield "fits instead", ", ".join(report.fits_instead)
    for note in report.notes:
        yield "note", note
    yield _verdict(report.same, f"Fits {report.base}.", f"Does not fit {report.base}.")


_SHOW: dict[str, Any] = {"merge": _show_merge, "delta": _show_delta, "fit": _show_fit}
