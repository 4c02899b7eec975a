"""`krona inspect`: a description of an adapter file, from its header alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from krona_hub.cli.console import announce, emit, fields_of, krona_command, log, show_facts, show_table, show_text
from krona_hub.cli.options import base_option, component_option, file_argument, from_option, report_option
from krona_hub.errors import one_of
from krona_hub.formats.reading.description import factorization_text, scale_text, vectors_text
from krona_hub.rendering.humanize import human_bytes
from krona_hub.rendering.tables import module_groups

if TYPE_CHECKING:
    from krona_hub.formats.compatibility.verdicts import Verdict
    from krona_hub.formats.reading.description import BaseFit, Description


OPTIONS = (
    from_option,
    base_option,
    component_option,
    click.Option(["--layers"], is_flag=True, help="List every module."),
    click.Option(["--sha256", "hashed"], is_flag=True, help="Also compute the SHA-256 of the whole file."),
    report_option,
)


@krona_command(
    "inspect",
    arguments=(file_argument,),
    options=OPTIONS,
    examples=(
        "krona inspect lora.safetensors",
        "krona inspect lokr.safetensors --layers",
        "krona inspect krona.safetensors --json",
        "krona inspect lora.safetensors --report lora.html",
    ),
)
def command(
    file: str,
    from_format: str | None,
    base: str | None,
    component: str | None,
    layers: bool,
    hashed: bool,
    report: str | None,
) -> None:
    """Show format, base model, modules, ranks, scale and size of an adapter file, and which applications load it.

    By default, only the header is read; --report also reads the values and --sha256 hashes the whole file.
    """
    from krona_hub.checkpoints.digest import file_sha256
    from krona_hub.formats.compatibility.verdicts import loads_in
    from krona_hub.formats.reading.describe import describe
    from krona_hub.rendering.html.markup import check_html_path
    from krona_hub.sources import resolve

    announce(file)
    path = resolve(file)
    if report:
        check_html_path(report)
    about = describe(path, format=from_format, base=base, component=component)
    if about.mismatch:  # one error, rather than a description of another base model
        raise about.mismatch.within(file)
    verdicts = loads_in(about)
    sha256 = file_sha256(about.header.path) if hashed else None
    emit(as_document(file, about, verdicts, sha256), lambda: _show(file, about, verdicts, sha256, every=layers))
    if report:
        from krona_hub.rendering.html.adapter_report import report_file

        log(f"Report: {report_file(report, about, verdicts)}")


def as_document(file: str, about: Description, verdicts: Mapping[str, Verdict], sha256: str | None) -> dict[str, Any]:
    """The description of the file as a JSON document."""
    return {
        "file": file,
        "sha256": sha256,
        **fields_of(about, without=("path", "header", "plans", "mismatch")),
        "metadata": about.header.metadata,
        "loads_in": {name: {"ok": verdict.ok, **fields_of(verdict)} for name, verdict in verdicts.items()},
    }


def _show(file: str, about: Description, verdicts: Mapping[str, Verdict], sha256: str | None, *, every: bool) -> None:
    show_facts(_facts(file, about, sha256))
    show_text()
    _show_modules(about) if every else _show_groups(about)
    if every and about.vectors:
        show_text()
        show_table(("vector", ">values"), ((" + ".join(v.parameters) or v.name, v.values) for v in about.vectors))
    show_text()
    show_facts(_loads(verdicts))


def _facts(file: str, about: Description, sha256: str | None) -> Iterator[tuple[str, Any]]:
    yield "file", f"{file}, {human_bytes(about.bytes)}"
    yield "sha256", sha256
    yield "format", about.format + (f", schema {about.schema}" if about.schema else "")
    yield from _base(about)
    yield "modules", about.matched
    yield "scale", about.scale_rule
    yield "parameters", about.parameters
    yield "stored as", ", ".join(about.dtypes)
    yield "trigger words", ", ".join(about.trigger_words)
    yield "license", about.licence
    yield "training", ", ".join(f"{key} {value}" for key, value in about.training.items())
    yield "vectors", vectors_text(about.vectors)
    yield "extras", ", ".join(about.extras)
    for warning in about.warnings:
        yield "warning", warning


def _loads(verdicts: Mapping[str, Verdict]) -> Iterator[tuple[str, str]]:
    """The applications that load the file, then one line per reason why others do not, or why that is not known.

    `(read)` marks what only the source of the application says.
    """
    from krona_hub.formats.compatibility.verdicts import UNKNOWN_BASE

    loading = [_cited(name, verdict) for name, verdict in verdicts.items() if verdict.ok]
    answers = {verdict.answer for verdict in verdicts.values()}
    none = "not known" if any(verdict.why == UNKNOWN_BASE for verdict in verdicts.values()) else "none for certain"
    yield "loads in", ", ".join(loading) or (none if "not known" in answers else "krona only")
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, verdict in verdicts.items():
        if not verdict.ok:
            reasons.setdefault((verdict.answer, verdict.why), []).append(_cited(name, verdict))
    for (answer, why), names in sorted(reasons.items(), key=lambda item: item[0][0] != "no"):
        yield "not in" if answer == "no" else answer, f"{', '.join(names)}: {why}"


def _cited(name: str, verdict: Verdict) -> str:
    return f"{name} (read)" if verdict.evidence.startswith("read") else name


def _base(about: Description) -> Iterator[tuple[str, str]]:
    """The base model and how much of it the file changes, or the base models that cannot be told apart."""
    tied = [fit for fit in about.fits if {fit.base, *fit.same_layers} & {about.base, *about.candidates}]
    names = about.candidates if len(about.candidates) > 1 else (about.base,) if about.base else about.candidates
    shares = {name: fit for fit in tied for name in (fit.base, *fit.same_layers)}
    texts = [_share(name, shares.get(name)) for name in names]
    if len(names) > 1:
        yield "base model", f"not certain: {one_of(texts)}; specify one with --base"
    else:
        yield "base model", texts[0] if texts else "unknown"
    yield "variants", ", ".join(variant for fit in tied for variant in fit.variants)


def _share(name: str, fit: BaseFit | None) -> str:
    return f"{name} ({fit.changed:,} of {fit.layers:,} layers)" if fit else name


def _show_groups(about: Description) -> None:
    show_table(
        (">modules", "kind", "factorization", "scale", ">parameters"),
        ((g.modules, _kind(g), g.factorization, g.scale, g.parameters) for g in module_groups(about.modules)),
    )


def _show_modules(about: Description) -> None:
    show_table(
        ("layer", "kind", "factorization", "scale", ">parameters"),
        ((_adapted(m), _kind(m), factorization_text(m), scale_text(m), m.parameters) for m in about.modules),
    )


def _adapted(module: Any) -> str:
    """The layers of a module, or the rows of one that it fills, with the first and the last row."""
    rows = f", rows {module.part[0]} to {module.part[1] - 1}" if module.part else ""
    return (" + ".join(module.layers) or str(module.name)) + rows


def _kind(module: Any) -> str:
    return f"{module.kind} + DoRA ({module.dora_axis}put axis)" if module.dora_axis else module.kind
