"""The page of an adapter file: what it is, which tools load it, how its layers' singular values fall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from krona_hub.adapters.adapter import Adapter
from krona_hub.errors import KronaError
from krona_hub.formats.compatibility.tools import Verdict
from krona_hub.formats.forms.normal_forms import size_of
from krona_hub.formats.reading.description import Description, factorization_text, scale_text
from krona_hub.formats.reading.reader import read_described
from krona_hub.rendering.html.charts import Axis, Line, Point, chart
from krona_hub.rendering.html.heat_map import heat_map
from krona_hub.rendering.html.markup import Markup, facts, page, pair, paragraph, section, table, write_page
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
ERROR = Axis("relative error", lowest=0, highest=1, words=percent)


def adapter_page(about: Description, loads: Mapping[str, Verdict], adapter: Adapter | None, unread: str = "") -> str:
    """The page of `krona inspect --report`. `adapter` are the numbers of the file; `unread` says why there are none."""
    return page(
        about.path.name,
        _verdict(about, loads),
        section("The file", facts(_facts(about), "What the file says of itself"), *map(paragraph, about.warnings)),
        section("Which tools load it", _loads(loads)),
        numbers_of(adapter) if adapter else section("Singular values", paragraph(f"Not shown: {unread}")),
        section("Modules", modules_of(about)),
    )


def numbers_of(adapter: Adapter) -> Markup:
    """The curves and the heat map of an adapter's singular values."""
    spectra, without = spectra_of(adapter.layers)
    if not spectra:
        return section("Singular values", paragraph("No layer is of a form whose singular values come cheaply."))
    if all(len(s.sigma) == 1 for s in spectra):
        told = (
            f"Each of {len(spectra):,} layers has a single singular value: nothing smaller is left to cut it down to."
        )
        return section("Singular values", paragraph(told), *_one_layer(adapter, spectra))
    curve = truncated(spectra, "the best adapter with fewer values per layer")
    dot = Line("this file", ((float(_size(adapter)), 0.0),), dot=True)
    what = "Every layer keeps its 1, 2, … largest singular values (of ΔW, or of R(ΔW) where it has several terms); "
    left_out = f"{len(without)} layers of several shapes are not in it" if without else "all layers are in it"
    size = chart(
        "Error against size",
        f"{what}computed from the singular values of {len(spectra):,} layers; {left_out}.",
        SIZE, ERROR, [Line(curve.name, curve.points), dot],
    )  # fmt: skip
    halves = {s.layer: s.error(s.half) for s in spectra}
    heat = heat_map(halves, "Error with half the values", "The relative error of each module if half of its singular "
                    "values, rounded up, were kept.")  # fmt: skip
    return section("Singular values", pair(size, spectrum_chart(spectra)), *_one_layer(adapter, spectra), heat)


def _size(adapter: Adapter) -> int:
    return sum(size_of(delta)[0] for delta in adapter.layers.values())


def spectrum_chart(spectra: Sequence[LayerSpectrum]) -> Markup:
    """Median and extremes of σₖ/σ₁ over the layers, of every layer that has a k-th value."""
    relative = [[v / s.sigma[0] for v in s.sigma[:PLOTTED]] for s in spectra if s.sigma[0] > 0]
    ranks = range(max(map(len, relative), default=0))
    columns = [sorted(r[k] for r in relative if k < len(r)) for k in ranks]
    lines = [
        Line(name, _points(columns, place), colour, thin)
        for name, place, colour, thin in (
            ("largest", 1.0, 1, True), ("median layer", 0.5, 0, False), ("smallest", 0.0, 2, True)
        )
    ]  # fmt: skip
    told = f"Each value over the layer's first, across {len(relative):,} layers; the first {len(columns)} values."
    return chart("How fast the singular values fall", told, Axis("number of the value"), _falling(columns), lines)


def _falling(columns: Sequence[Sequence[float]]) -> Axis:
    lowest = min((c[0] for c in columns), default=1.0)
    return Axis("value / first value", log=lowest < 0.01, lowest=None if lowest < 0.01 else 0.0)


def _points(columns: Sequence[Sequence[float]], place: float) -> tuple[Point, ...]:
    return tuple((k + 1.0, column[round(place * (len(column) - 1))]) for k, column in enumerate(columns))


def _one_layer(adapter: Adapter, spectra: Sequence[LayerSpectrum]) -> tuple[Markup, ...]:
    """R(ΔW) of one layer, which is named: of all layers it would take minutes."""
    name = shown_layer(adapter.layers, spectra)
    found = rearrangements(adapter.layers[name]) if name else ()
    if name is None or not found:
        return (paragraph(f"No layer of at most {LARGEST:,} numbers: no spectrum of R(ΔW) is shown.", "soft"),)
    own = next(s for s in spectra if s.layer == name)
    return (
        paragraph(
            f"What Kronecker products can keep, shown for one layer, {name}: of those whose ΔW has at most {LARGEST:,} "
            "numbers, the one of the largest norm. Other layers may differ."
        ),
        pair(_spectra_of(found, name), _errors_of(found, own)),
    )


def _spectra_of(found: Sequence[Rearrangement], name: str) -> Markup:
    lines = [
        Line(f"A of {r.shape.a1}x{r.shape.a2}", [(k + 1.0, s) for k, s in enumerate(r.sigma)], i)
        for i, r in enumerate(found)
    ]
    most = max(len(r.sigma) for r in found)
    told = f"R(ΔW) of {name}: a flat line means that no few Kronecker products hold it. The first {most} values."
    return chart("Spectrum of the rearranged matrix", told, Axis("number of the term"),
                 Axis("value / norm of ΔW", lowest=0.0), lines)  # fmt: skip


def _errors_of(found: Sequence[Rearrangement], own: LayerSpectrum) -> Markup:
    lora = [(float(k * own.cost), own.error(k)) for k in range(1, min(len(own.sigma), PLOTTED) + 1)]
    lines = [Line(f"{r.shape.a1}x{r.shape.a2}, more and more terms", r.points, i) for i, r in enumerate(found)]
    told = "The nearest Kronecker sums of this one layer, and its own largest values; sizes on a logarithmic scale."
    axis = Axis("parameters", log=True)
    return chart("Error against size, one layer", told, axis, ERROR, [*lines, Line("its own values", lora, 3)])


def _verdict(about: Description, loads: Mapping[str, Verdict]) -> str:
    tools = [tool for tool, verdict in loads.items() if verdict.ok]
    base = about.base or (" or ".join(about.candidates) if about.candidates else "an unknown base")
    reads = f"{len(tools)} of {len(loads)} tools load it" if tools else "no tool but krona loads it"
    trouble = f" {len(about.unmatched):,} modules cannot be read." if about.unmatched else ""
    return (
        f"A {about.format} adapter for {base}: {len(about.modules):,} modules, {about.parameters:,} parameters, "
        f"{human_bytes(about.bytes)}; {reads}.{trouble}"
    )


def _facts(about: Description) -> list[tuple[str, object]]:
    return [
        ("format", about.format + (f", schema {about.schema}" if about.schema else "")),
        ("base", about.base or " or ".join(about.candidates) or "unknown"),
        ("modules", about.matched),
        ("scale", about.scale_rule),
        ("parameters", about.parameters),
        ("size", human_bytes(about.bytes)),
        ("stored as", ", ".join(about.dtypes)),
        ("trigger words", ", ".join(about.trigger_words)),
        ("licence", about.licence),
        ("extras", ", ".join(about.extras)),
        *((f"training: {name}", value) for name, value in about.training.items()),
    ]


def _loads(loads: Mapping[str, Verdict]) -> Markup:
    return table(("tool", "loads it", "why not"), ((t, "yes" if v.ok else "no", v.why) for t, v in loads.items()),
                 "Tools")  # fmt: skip


def modules_of(about: Description) -> Markup:
    """Every module of a file."""
    rows = [
        (m.layers or (m.name,), (m.kind + (" + DoRA" if m.dora_axis else ""), factorization_text(m), scale_text(m),
                                 m.parameters))
        for m in about.modules
    ]  # fmt: skip
    return modules_table(("kind", "form", "scale", ">parameters"), rows)


def report_file(out: str | Path, about: Description, loads: Mapping[str, Verdict]) -> Path:
    """Read the numbers of the described file and write its page; where they cannot be read, the page says why."""
    try:
        adapter, unread = read_described(about, allow_missing=True), ""
    except KronaError as error:
        adapter, unread = None, error.cause
    return write_page(out, adapter_page(about, loads, adapter, unread))
