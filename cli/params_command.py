"""`krona params`: the number of parameters of an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from krona_hub.cli.console import emit, krona_command, log, show_facts, show_table, show_text
from krona_hub.cli.options import base_option, report_option

if TYPE_CHECKING:
    from krona_hub.accounting.counting import Accounting, CountRow

NAMED = 3  # layers named before "and N more"


OPTIONS = (
    base_option,
    click.Option(
        ["--component", "components"],
        multiple=True,
        metavar="NAME",
        help="unet, transformer, text_encoder, …; text for every text encoder, all for everything; repeatable "
        "[unet or transformer].",
    ),
    click.Option(
        ["--targets"],
        metavar="SET|REGEX",
        help="attn, attn+ff, all, a set of a trainer (listed below the table) or a regular expression [attn].",
    ),
    click.Option(
        ["--shape", "shapes"], default="64x4,64x8,64x16", show_default=True, metavar="A1xA2,…", help="Shapes of A."
    ),
    click.Option(
        ["--factor", "factors"], default="8,16", show_default=True, metavar="N,…", help="LoKr factors; -1 for near √n."
    ),
    click.Option(["--rank", "ranks"], default="4,16", show_default=True, metavar="N,…", help="Ranks of LoRA and LoKr."),
    click.Option(["--terms"], default=1, show_default=True, metavar="K", help="Kronecker terms per layer."),
    report_option,
)


@krona_command(
    "params",
    arguments=(click.Argument(["file"], required=False, type=click.Path()),),
    options=OPTIONS,
    examples=(
        "krona params --base sdxl",
        "krona params --base sd15 --component all --shape 64x4,32x8 --rank 4",
        "krona params --base flux1-dev --targets attn+ff --factor 8,16",
        "krona params --base sdxl --targets 'mid_block.*attn2' --json",
        "krona params lora.safetensors",
        "krona params --base sdxl --report sdxl.html",
    ),
)
def command(
    file: str | None,
    base: str | None,
    components: tuple[str, ...],
    targets: str | None,
    shapes: str,
    factors: str,
    ranks: str,
    terms: int,
    report: str | None,
) -> None:
    """Count an adapter's parameters before training, or compare a FILE with other factorizations of its layers.

    No weights are needed and nothing is downloaded. KronA and DiffuseKronA of shape a1xa2 need a1·a2 + out·in/(a1·a2)
    parameters per layer and term; "by width" uses the smallest shape for each layer. The last column shows the rank of
    a LoRA of the same layers with the same number of parameters.
    """
    from krona_hub.accounting import counting
    from krona_hub.rendering.html.markup import check_html_path, write_html
    from krona_hub.rendering.html.parameter_report import parameter_html

    if report:
        check_html_path(report)
    factorizations: dict[str, Any] = {
        "shapes": _words(shapes),
        "factors": _numbers("--factor", factors),
        "ranks": _numbers("--rank", ranks),
        "terms": terms,
    }
    if file is None:
        selection = {"targets": targets or "attn", "component": components or None}
        found = counting.account(base or _missing_base(), **selection, **factorizations)
    else:
        _refuse_targets(targets)
        found = counting.account_file(file, base=base, component=next(iter(components), None), **factorizations)
    emit(found, lambda: _show(found))
    if report:
        log(f"Report: {write_html(report, parameter_html(found))}")


def _refuse_targets(targets: str | None) -> None:
    from krona_hub.errors import UsageError

    if targets is not None:
        raise UsageError("FILE and --targets exclude each other: a file has its own layers.", fix="Remove one of them.")


def _missing_base() -> str:
    from krona_hub.bases.catalog import names
    from krona_hub.errors import UsageError

    raise UsageError(
        "Missing argument FILE or option --base.",
        fix=f"Specify a file or --base with a folder or one of {', '.join(names())}.",
    )


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(option: str, text: str) -> list[int]:
    from krona_hub.errors import UsageError

    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise UsageError(
            f"Invalid value {text!r} for {option}.", fix=f"Use comma-separated integers, e.g. {option} 4,16."
        ) from None


def _show(found: Accounting) -> None:
    show_facts(_facts(found))
    show_text()
    show_table(("method", ">parameters", ">layers", ">MB in fp16", ">equivalent LoRA rank"), map(_cells, found.rows))
    for row in found.rows:
        if row.undivided:
            show_text(f"{row.method} does not divide {_some(row.undivided)}; not counted.", "yellow")
    if found.target_sets:
        show_text(f"Sets for --targets: {', '.join(found.target_sets)}; or a regular expression.", "dim")


def _facts(found: Accounting) -> list[tuple[str, object]]:
    facts: list[tuple[str, object]] = [("base model", found.base), ("targets", found.targets)]
    for part in found.parts:
        whole = f" of {part.total_parameters:,} parameters" if part.total_parameters else ""
        facts += [(part.component, f"{part.modules:,} layers, {part.weights:,} weights{whole}"), ("", part.checked)]
    return [*facts, ("not covered", ", ".join(found.uncovered))]


def _cells(row: CountRow) -> tuple[str, int, int, str, str]:
    return row.method, row.parameters, row.modules, f"{row.bytes_fp16 / 1e6:.3g}", f"{row.lora_rank:.2f}"


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
