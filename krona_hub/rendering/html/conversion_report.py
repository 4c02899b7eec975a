"""The page of a conversion: the verdict, its error against its size, and the error of every module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from krona_hub.adapters.adapter import Adapter
from krona_hub.conversion import ConversionReport
from krona_hub.conversion.report import worst_layers
from krona_hub.formats.reading.reader import read
from krona_hub.rendering.html.adapter_report import ERROR, SIZE, spectrum_chart
from krona_hub.rendering.html.charts import Line, chart
from krona_hub.rendering.html.heat_map import heat_map
from krona_hub.rendering.html.markup import Markup, facts, page, pair, paragraph, section, table, write_page
from krona_hub.rendering.html.module_table import modules_table
from krona_hub.rendering.html.spectra import spectra_of, truncated
from krona_hub.rendering.humanize import human_bytes, percent, relative
from krona_hub.sources import resolve

MOST = 20  # layers with the largest errors


def conversion_page(report: ConversionReport, before: Adapter, instead: str = "") -> str:
    """The page of `krona convert --report`; `before` is the adapter that was converted, or was not: then `instead` is
    the advice of the refusal.
    """
    errors = {x.layer: x.relative_error for x in report.layers}
    told = "‖ΔW′ − ΔW‖ / ‖ΔW‖ of each module, measured on what is written."
    return page(
        f"{Path(report.source).name} → {report.target_format}",
        f"Refused, nothing was written. {report.verdict}" if instead else report.verdict,
        section("What to do instead", paragraph(instead)),
        section("In total", facts(_facts(report), "Before and after"), *map(paragraph, report.notes)),
        section("Error against size", _curves(report, before)),
        section("Where the error is", heat_map(errors, "Relative error", told), _worst(report)),
        section("Modules", _modules(report)),
    )


def _curves(report: ConversionReport, before: Adapter) -> Markup:
    spectra, without = spectra_of(before.layers)
    curve = truncated(spectra, "the input with fewer singular values per layer")
    dots = [
        Line("the input", ((float(report.parameters_before), 0.0),), dot=True),
        Line("the result", ((float(report.parameters_after), report.relative_error),), 2, dot=True),
    ]
    missing = f"; {len(without):,} layers of several shapes are not in the curve" if without else ""
    told = (
        f"What cutting the input down loses: every layer keeps its 1, 2, … largest singular values, computed for "
        f"{len(spectra):,} layers{missing}. A result below the curve is better than that."
    )
    size = chart("Error against size", told, SIZE, ERROR, [Line(curve.name, curve.points), *dots])
    return pair(size, spectrum_chart(spectra) if spectra else Markup(""))


def _facts(report: ConversionReport) -> list[tuple[str, object]]:
    return [
        ("layers", len(report.layers)),
        ("format", f"{report.source_format} → {report.target_format}" + (f" for {report.tool}" if report.tool else "")),
        ("parameters", f"{report.parameters_before:,} → {report.parameters_after:,}"),
        ("size of the tensors", f"{human_bytes(report.bytes_before)} → {human_bytes(report.bytes_after)}"),
        ("relative error", relative(report.relative_error)),
        ("energy kept", percent(report.energy_kept)),
        ("read back", report.checked.removeprefix("checked: ") or "nothing was written"),
        ("file", report.out.name if report.written else None),
        *(("also", text) for text in report.alternatives),
    ]


def _modules(report: ConversionReport) -> Markup:
    rows = [
        (
            (x.layer,),
            (x.before, x.after, x.parameters_before, x.parameters_after, f"{100 * x.relative_error:.3g}", x.note),
        )
        for x in report.layers
    ]
    return modules_table(("before", "now", ">parameters", ">now", ">error, %", "note"), rows)


def _worst(report: ConversionReport) -> Markup:
    """The layers with the largest errors, and what else they could be: of all layers that would be most of the page."""
    worst = worst_layers(report.layers, MOST)
    rows = [(x.layer, x.after, f"{100 * x.relative_error:.3g}", x.best_other) for x in worst]
    others = any(x.best_other for x in worst)
    names = ("module", "now", ">error, %", "best other form")
    shown = len(names) if others else len(names) - 1
    return table(names[:shown], [row[:shown] for row in rows], "The largest errors") if rows else Markup("")


def report_conversion(
    out: str | Path, source: str, report: ConversionReport, options: Mapping[str, Any], instead: str = ""
) -> Path:
    """Read the source once more, as the conversion with these options did, and write the page.

    Of a conversion that was refused, `instead` is the advice.
    """
    before = read(
        resolve(source),
        base=options.get("base"),
        format=options.get("from_format"),
        component=options.get("component"),
        allow_missing=bool(options.get("allow_missing")),
    )
    return write_page(out, conversion_page(report, before, instead))
