"""The HTML report of `krona params`: sizes of adapters before training."""

from __future__ import annotations

from krona_hub.accounting.counting import Accounting, CountRow
from krona_hub.rendering.html.charts import bars, short
from krona_hub.rendering.html.markup import facts, page, paragraph, section, table
from krona_hub.rendering.humanize import human_bytes


def parameter_html(found: Accounting) -> str:
    """Build the report on the parameter counts of adapters for a base, or of other factorizations of a file."""
    rows = tuple(sorted(found.rows, key=lambda row: row.parameters))
    caption = "Parameters of the adapter, without alpha. Factorizations that do not fit every layer are marked with *."
    return page(
        f"Parameters of adapters for {found.base}",
        _verdict(found),
        section("Overview", bars("Parameters of each factorization", caption, [_bar(row) for row in rows])),
        section(
            "All factorizations",
            table(
                ("factorization", ">parameters", ">layers", "size in fp16", ">equivalent LoRA rank"),
                (
                    (r.method, r.parameters, r.modules, human_bytes(r.bytes_fp16), f"{r.lora_rank:.2f}")
                    for r in found.rows
                ),
                "Factorizations of the same layers; click a header to sort",
            ),
            *(
                paragraph(f"{r.method} does not divide {len(r.undivided):,} layers; they are not counted: {_some(r)}.")
                for r in found.rows
                if r.undivided
            ),
        ),
        section("Adapted layers", facts(_facts(found), "Layers counted")),
    )


def _verdict(found: Accounting) -> str:
    """Compare the smallest factorization that fits every layer with the largest."""
    whole = [row for row in found.rows if not row.undivided and row.parameters]
    if not whole:
        return f"No factorization fits all {found.modules:,} layers."
    least, most = min(whole, key=lambda r: r.parameters), max(whole, key=lambda r: r.parameters)
    if least.parameters == most.parameters:
        return f"{least.method}: {least.parameters:,} parameters in {least.modules:,} layers."
    return (
        f"{least.method} is the smallest factorization that fits all {least.modules:,} layers: {least.parameters:,} "
        f"parameters ({human_bytes(least.bytes_fp16)} in fp16). {most.method} has "
        f"{most.parameters / least.parameters:.1f}× as many."
    )


def _bar(row: CountRow) -> tuple[str, float, str]:
    return row.method + (" *" if row.undivided else ""), float(row.parameters), short(row.parameters)


def _some(row: CountRow, most: int = 3) -> str:
    more = f" and {len(row.undivided) - most:,} more" if len(row.undivided) > most else ""
    return ", ".join(row.undivided[:most]) + more


def _facts(found: Accounting) -> list[tuple[str, object]]:
    parts = [
        (
            part.component,
            f"{part.modules:,} layers, {part.weights:,} weights"
            + (f" of {part.total_parameters:,} parameters" if part.total_parameters else ""),
        )
        for part in found.parts
    ]
    return [("base model", found.base), ("targets", found.targets), *parts, ("not covered", ", ".join(found.uncovered))]
