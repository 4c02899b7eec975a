"""The HTML report on an adapter file: contents, compatible applications, and the singular values of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from krona_hub.adapters.adapter import Adapter
from krona_hub.errors import KronaError
from krona_hub.formats.compatibility.verdicts import Verdict
from krona_hub.formats.forms.normal_forms import size_of
from krona_hub.formats.reading.description import Description, factorization_text, scale_text, vectors_text
from krona_hub.formats.reading.reader import read_described
from krona_hub.rendering.html.charts import Axis, Line, Point, chart
from krona_hub.rendering.html.heat_map import heat_map
from krona_hub.rendering.html.markup import Markup, facts, page, pair, paragraph, section, table, write_html
from krona_hub.rendering.html.module_table import modules_table
from krona_hub.rendering.html.spectra import (
    LARGEST,
    PLOTTED,
    LayerSpectrum,
    Rearrangement,
    rearrangements,
    shown_layer,
    spectra_of,
    truncated,
)
from krona_hub.rendering.humanize import human_bytes, percent

SIZE = Axis("parameters", lowest=0)
ERROR = Axis("relative error", lowest=0, highest=1, format=percent)


def adapter_html(about: Description, loads: Mapping[str, Verdict], adapter: Adapter | None, unread: str = "") -> str:
    """Build the report of `krona inspect --report`. Without `adapter`, `unread` is the reason why it was not read."""
    return page(
        about.path.name,
        _verdict(about, loads),
        section("File", facts(_facts(about), "Properties of the file"), *map(paragraph, about.warnings)),
        section("Compatibility", _loads(loads)),
        _singular_values(adapter) if adapter else section("Singular values", paragraph(f"Not shown: {unread}")),
        section("Modules", modules_of(about)),
    )


def _singular_values(adapter: Adapter) -> Markup:
    """Show the curves and the heat map of an adapter's singular values."""
    spectra, without = spectra_of(adapter.layers)
    if not spectra:
        return section("Singular values", paragraph("Not shown: they are not cheap to compute for any layer."))
    if all(len(s.sigma) == 1 for s in spectra):
        single = f"Each of {len(spectra):,} layers has a single singular value and cannot be truncated further."
        return section("Singular values", paragraph(single), *_one_layer(adapter, spectra))
    curve = truncated(spectra, "the best adapter with fewer values per layer")
    dot = Line("this file", ((float(_size(adapter)), 0.0),), dot=True)
    method = "Every layer keeps its 1, 2, … largest singular values (of ΔW, or of R(ΔW) if it has several terms); "
    left_out = f"{len(without)} layers with several shapes are excluded" if without else "all layers are included"
    size = chart(
        "Error against size",
        f"{method}computed from the singular values of {len(spectra):,} layers; {left_out}.",
        SIZE, ERROR, [Line(curve.name, curve.points), dot],
    )  # fmt: skip
    halves = {s.layer: s.error(s.half) for s in spectra}
    heat = heat_map(halves, "Error with half of the values", "Relative error of each module if half of its singular "
                    "values, rounded up, are kept.")  # fmt: skip
    return section("Singular values", pair(size, spectrum_chart(spectra)), *_one_layer(adapter, spectra), heat)


def _size(adapter: Adapter) -> int:
    return sum(size_of(delta)[0] for delta in adapter.layers.values())


def spectrum_chart(spectra: Sequence[LayerSpectrum]) -> Markup:
    """Plot the median and the extremes of σₖ/σ₁ over all layers that have a k-th value."""
    relative = [[v / s.sigma[0] for v in s.sigma[:PLOTTED]] for s in spectra if s.sigma[0] > 0]
    ranks = range(max(map(len, relative), default=0))
    columns = [sorted(r[k] for r in relative if k < len(r)) for k in ranks]
    lines = [
        Line(name, _points(columns, quantile), color, thin)
        for name, quantile, color, thin in (
            ("largest", 1.0, 1, True), ("median layer", 0.5, 0, False), ("smallest", 0.0, 2, True)
        )
    ]  # fmt: skip
    caption = f"Values relative to the layer's first, over {len(relative):,} layers; the first {len(columns)} values."
    return chart("Decay of the singular values", caption, Axis("index of the value"), _falling(columns), lines)


def _falling(columns: Sequence[Sequence[float]]) -> Axis:
    lowest = min((c[0] for c in columns), default=1.0)
    return Axis("value / first value", log=lowest < 0.01, lowest=None if lowest < 0.01 else 0.0)


def _points(columns: Sequence[Sequence[float]], quantile: float) -> tuple[Point, ...]:
    return tuple((k + 1.0, column[round(quantile * (len(column) - 1))]) for k, column in enumerate(columns))


def _one_layer(adapter: Adapter, spectra: Sequence[LayerSpectrum]) -> tuple[Markup, ...]:
    """Show R(ΔW) of one named layer: for all layers, this would take minutes."""
    name = shown_layer(adapter.layers, spectra)
    found = rearrangements(adapter.layers[name]) if name else ()
    if name is None or not found:
        return (paragraph(f"Every layer has more than {LARGEST:,} entries: the spectrum of R(ΔW) is omitted.", "soft"),)
    own = next(s for s in spectra if s.layer == name)
    return (
        paragraph(
            f"Approximation by Kronecker products for one layer, {name}: the one with the largest norm among those "
            f"whose ΔW has at most {LARGEST:,} entries. Other layers may differ."
        ),
        pair(_spectra_of(found, name), _errors_of(found, own)),
    )


def _spectra_of(found: Sequence[Rearrangement], name: str) -> Markup:
    lines = [
        Line(f"A of {r.shape.a1}x{r.shape.a2}", [(k + 1.0, s) for k, s in enumerate(r.sigma)], i)
        for i, r in enumerate(found)
    ]
    most = max(len(r.sigma) for r in found)
    caption = (
        f"R(ΔW) of {name}: a flat line means that few Kronecker products cannot represent it. First {most} values."
    )
    return chart("Spectrum of the rearranged matrix", caption, Axis("index of the term"),
                 Axis("value / norm of ΔW", lowest=0.0), lines)  # fmt: skip


def _errors_of(found: Sequence[Rearrangement], own: LayerSpectrum) -> Markup:
    lora = [(float(k * own.cost), own.error(k)) for k in range(1, min(len(own.sigma), PLOTTED) + 1)]
    lines = [Line(f"{r.shape.a1}x{r.shape.a2}, increasing terms", r.points, i) for i, r in enumerate(found)]
    caption = "The nearest Kronecker sums of this layer, and its own largest values; sizes on a logarithmic scale."
    axis = Axis("parameters", log=True)
    return chart("Error against size, one layer", caption, axis, ERROR, [*lines, Line("its own values", lora, 3)])


def _verdict(about: Description, loads: Mapping[str, Verdict]) -> str:
    tools = [tool for tool, verdict in loads.items() if verdict.ok]
    base = about.base or (" or ".join(about.candidates) if about.candidates else "an unknown base model")
    is_open = any(verdict.answer == "not known" for verdict in loads.values())
    none = "which applications load it is not known" if is_open else "only krona loads it"
    reads = f"{len(tools)} of {len(loads)} applications load it" if tools else none
    unread = f" {len(about.unmatched):,} modules are unreadable." if about.unmatched else ""
    return (
        f"A {about.format} adapter for {base}: {len(about.modules):,} modules, {about.parameters:,} parameters, "
        f"{human_bytes(about.bytes)}; {reads}.{unread}"
    )


def _facts(about: Description) -> list[tuple[str, object]]:
    return [
        ("format", about.format + (f", schema {about.schema}" if about.schema else "")),
        ("base model", about.base or " or ".join(about.candidates) or "unknown"),
        ("modules", about.matched),
        ("scale", about.scale_rule),
        ("parameters", about.parameters),
        ("size", human_bytes(about.bytes)),
        ("data types", ", ".join(about.dtypes)),
        ("trigger words", ", ".join(about.trigger_words)),
        ("license", about.licence),
        ("vectors", vectors_text(about.vectors)),
        ("extras", ", ".join(about.extras)),
        *((f"training: {name}", value) for name, value in about.training.items()),
    ]


def _loads(loads: Mapping[str, Verdict]) -> Markup:
    rows = ((name, v.answer, v.why, v.evidence) for name, v in loads.items())
    return table(("application", "loads it", "reason", "evidence"), rows, "Applications")


def modules_of(about: Description) -> Markup:
    """List every module of a file."""
    rows = [
        (m.layers or (m.name,), (m.kind + (" + DoRA" if m.dora_axis else ""), factorization_text(m), scale_text(m),
                                 m.parameters))
        for m in about.modules
    ]  # fmt: skip
    return modules_table(("kind", "factorization", "scale", ">parameters"), rows)


def report_file(out: str | Path, about: Description, loads: Mapping[str, Verdict]) -> Path:
    """Read the described file and write its report; if it cannot be read, the report states the reason."""
    try:
        adapter, unread = read_described(about, allow_missing=True), ""
    except KronaError as error:
        adapter, unread = None, error.cause
    return write_html(out, adapter_html(about, loads, adapter, unread))
