"""The page of `krona params`: sizes of adapters before anybody trains one."""

from __future__ import annotations

from krona_hub.accounting.counting import Accounting, CountRow
from krona_hub.rendering.html.charts import bars, short
from krona_hub.rendering.html.markup import facts, page, paragraph, section, table
from krona_hub.rendering.humanize import human_bytes


def count_page(found: Accounting) -> str:
    """What adapters of a base, or other forms of a file, cost."""
    rows = tuple(sorted(found.rows, key=lambda row: row.parameters))
    told = "Numbers in the adapter, alpha not counted. Those that do not fit every layer are marked with *."
    return page(
        f"Parameters of adapters for {found.base}",
        _verdict(found),
        section("At a glance", bars("Parameters of each form", told, [_bar(row) for row in rows])),
        section(
            "Every form",
            table(
                ("method", ">parameters", ">layers", "size in fp16", ">as a LoRA of rank"),
                (
                    (r.method, r.parameters, r.modules, human_bytes(r.bytes_fp16), f"{r.lora_rank:.2f}")
                    for r in found.rows
                ),
                "Forms of the same layers; a click on a header sorts",
            ),
            *(
                paragraph(f"{r.method} does not divide {len(r.undivided):,} layers; they are not counted: {_some(r)}.")
                for r in found.rows
                if r.undivided
            ),
        ),
        section("What is adapted", facts(_facts(found), "Layers counted")),
    )


def _verdict(found: Accounting) -> str:
    """The cheapest form that fits every layer, against the largest."""
    whole = [row for row in found.rows if not row.undivided and row.parameters]
    if not whole:
        return f"No form fits all {found.modules:,} layers."
    least, most = min(whole, key=lambda r: r.parameters), max(whole, key=lambda r: r.parameters)
    if least.parameters == most.parameters:
        return f"{least.method}: {least.parameters:,} parameters in {least.modules:,} layers."
    return (
        f"Of the forms that fit all {least.modules:,} layers, {least.method} is the smallest with {least.parameters:,} "
        f"parameters ({human_bytes(least.bytes_fp16)} in fp16): {most.parameters / least.parameters:.1f} times fewer "
        f"than {most.method}."
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
    return [("base", found.base), ("targets", found.targets), *parts, ("not covered", ", ".join(found.uncovered))]
