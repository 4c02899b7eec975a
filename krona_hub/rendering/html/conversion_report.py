"""The HTML report on a conversion: the verdict, error against size, and the error of every module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from krona_hub.adapters.adapter import Adapter
from krona_hub.conversion import ConversionReport
from krona_hub.conversion.report import percent as share
from krona_hub.conversion.report import worst_layers
from krona_hub.formats.reading.reader import read
from krona_hub.rendering.html.adapter_report import ERROR, SIZE, spectrum_chart
from krona_hub.rendering.html.charts import Axis, Line, chart
from krona_hub.rendering.html.heat_map import heat_map
from krona_hub.rendering.html.markup import Markup, facts, page, pair, paragraph, section, table, write_html
from krona_hub.rendering.html.module_table import modules_table
from krona_hub.rendering.html.spectra import spectra_of, truncated
from krona_hub.rendering.humanize import human_bytes, percent, relative
from krona_hub.sources import resolve

EFFECT = Axis("effect kept", lowest=0, highest=1, format=percent)
MOST = 20  # layers with the largest errors


def conversion_html(report: ConversionReport, before: Adapter, instead: str = "") -> str:
    """Build the report of `krona convert --report`; `before` is the input adapter. If the conversion was refused,
    `instead` is the suggested fix.
    """
    errors = {x.layer: x.relative_error for x in report.layers}
    caption = "‖ΔW′ − ΔW‖ / ‖ΔW‖ of each module, measured on the written values."
    return page(
        f"{Path(report.source).name} → {report.target_format}",
        f"Refused, nothing was written. {report.verdict}" if instead else report.verdict,
        section("Suggested fix", paragraph(instead)),
        section("Summary", facts(_facts(report), "Original and result"), *map(paragraph, report.notes)),
        section("Effect against size", _effect_curve(report)),
        section("Error against size", _curves(report, before)),
        section("Error by module", heat_map(errors, "Relative error", caption), _worst(report)),
        section("Modules", _modules(report)),
    )


def _curves(report: ConversionReport, before: Adapter) -> Markup:
    spectra, without = spectra_of(before.layers)
    curve = truncated(spectra, "the input with fewer singular values per layer")
    dots = [
        Line("the input", ((float(report.parameters_before), 0.0),), dot=True),
        Line("the result", ((float(report.parameters_after), report.relative_error),), 2, dot=True),
    ]
    missing = f"; {len(without):,} layers with several shapes are excluded from the curve" if without else ""
    caption = (
        f"Error of truncating the input: every layer keeps its 1, 2, … largest singular values, computed for "
        f"{len(spectra):,} layers{missing}. A result below the curve is better than truncation."
    )
    size = chart("Error against size", caption, SIZE, ERROR, [Line(curve.name, curve.points), *dots])
    return pair(size, spectrum_chart(spectra) if spectra else Markup(""))


def _effect_curve(report: ConversionReport) -> Markup:
    """The predicted effect over the size, with the result; empty without moments."""
    size, effect = float(report.parameters_after), report.effect
    lines = [Line("predicted by the moments", tuple((float(p), kept) for p, kept in report.effect_curve))]
    if report.predicted_effect is not None:
        lines.append(Line("the result, predicted", ((size, report.predicted_effect),), 1, dot=True))
    if effect is not None:
        lines.append(Line("the result, measured", ((size, max(0.0, effect.kept)),), 2, dot=True))
    caption = (
        "1 − E‖result − source‖² / E‖base − source‖² of the denoiser's outputs, for cuts of other sizes, predicted."
    )
    return (
        pair(chart("Effect against size", caption, SIZE, EFFECT, lines), Markup(""))
        if report.effect_curve
        else Markup("")
    )


def _effect_facts(report: ConversionReport) -> list[tuple[str, object]]:
    if report.predicted_effect is None:
        return []
    effect, facts_ = report.effect, [("predicted effect", share(report.predicted_effect)), ("gain", report.gain)]
    if effect is None:
        return [*facts_, ("measured effect", "not measured")]
    low, high = effect.kept_range
    held_out = f"{len(effect.prompts)} held-out prompts, {effect.samples} samples, seed {effect.seed}"
    facts_ += [
        ("measured effect", f"{share(effect.kept)}, 95 % range {share(low)} to {share(high)}: {held_out}"),
        ("strength", f"{effect.strength:.2f} of the source along its effect"),
    ]
    if effect.other_kept is not None:
        facts_ += [
            ("effect on other prompts", f"{share(effect.other_kept)}, {len(effect.other_prompts)} prompts"),
            ("change of other prompts", f"{effect.drift:.2f} of that of the source"),
        ]
    return facts_


def _facts(report: ConversionReport) -> list[tuple[str, object]]:
    return [
        ("layers", f"{len(report.layers):,}{report.kept_and_left_out}"),
        ("format", f"{report.source_format} → {report.target_format}" + (f" for {report.tool}" if report.tool else "")),
        ("parameters", f"{report.parameters_before:,} → {report.parameters_after:,}"),
        ("size of the tensors", f"{human_bytes(report.bytes_before)} → {human_bytes(report.bytes_after)}"),
        *_effect_facts(report),
        ("relative error", relative(report.relative_error)),
        ("retained energy", percent(report.energy_kept)),
        ("read-back check", report.checked.removeprefix("checked: ") or "nothing was written"),
        ("file", report.out.name if report.written else None),
        *(("alternative", text) for text in report.alternatives),
    ]


def _modules(report: ConversionReport) -> Markup:
    rows = [
        (
            (x.layer,),
            (x.before, x.after, x.parameters_before, x.parameters_after, f"{100 * x.relative_error:.3g}", x.note),
        )
        for x in report.layers
    ]
    return modules_table(
        ("original", "new factorization", ">original parameters", ">new parameters", ">error, %", "note"), rows
    )


def _worst(report: ConversionReport) -> Markup:
    """The remaining layers with the largest errors and their best alternatives: all would fill the report."""
    worst = worst_layers(report.layers, MOST)
    rows = [(x.layer, x.after, f"{100 * x.relative_error:.3g}", x.best_other) for x in worst]
    others = any(x.best_other for x in worst)
    names = ("module", "new factorization", ">error, %", "best alternative")
    shown = len(names) if others else len(names) - 1
    title = "The largest errors of the kept layers" if report.layers_left_out else "The largest errors"
    return table(names[:shown], [row[:shown] for row in rows], title) if rows else Markup("")


def report_conversion(
    out: str | Path, source: str, report: ConversionReport, options: Mapping[str, Any], instead: str = ""
) -> Path:
    """Read the source again with the options of the conversion, and write the report.

    If the conversion was refused, `instead` is the suggested fix.
    """
    before = read(
        resolve(source),
        base=options.get("base"),
        format=options.get("from_format"),
        component=options.get("component"),
        allow_missing=bool(options.get("allow_missing")),
    )
    return write_html(out, conversion_html(report, before, instead))
