"""Library results as plain values and text, for the screen and for JSON. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from krona_hub.formats.reading.description import factorization_text, scale_text

if TYPE_CHECKING:
    from krona_hub.conversion import LayerReport
    from krona_hub.formats.reading.description import ModuleInfo


class FactorizationGroup(NamedTuple):
    """Layers with the same original and the same new factorization."""

    layers: int
    before: str
    after: str
    parameters_before: int
    parameters_after: int
    worst_error: float
    note: str  # if all layers share it


def factorization_groups(layers: Sequence[LayerReport], most: int = 8) -> tuple[FactorizationGroup, ...]:
    """Group the layers of a conversion by factorization, largest group first; groups beyond `most` become one."""
    groups: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault((layer.before, layer.after), []).append(layer)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    if len(ordered) > most:
        rest = ordered[most - 1 :]
        ordered = [
            *ordered[: most - 1],
            (("various", f"{len(rest)} other factorizations"), [x for _, xs in rest for x in xs]),
        ]
    return tuple(_group(before, after, members) for (before, after), members in ordered)


def _group(before: str, after: str, members: Sequence[LayerReport]) -> FactorizationGroup:
    parameters = sum(x.parameters_before for x in members), sum(x.parameters_after for x in members)
    notes = {x.note for x in members}
    note = notes.pop() if len(notes) == 1 else ""
    return FactorizationGroup(len(members), before, after, *parameters, max(x.relative_error for x in members), note)


class FormatFacts(NamedTuple):
    """A format as listed by `krona formats`."""

    name: str
    reads: bool
    writes: bool
    summary: str


def format_facts() -> tuple[FormatFacts, ...]:
    """List every format, in the order of FORMATS."""
    from krona_hub.formats.known.registry import FORMATS

    return tuple(FormatFacts(format.name, True, format.writes, format.summary) for format in FORMATS)


class Cell(NamedTuple):
    """Whether an application reads a format."""

    mark: str  # "yes", "some" (shapes; `krona inspect` shows which), "?" (not known) or "–"
    why: str


def loads_matrix() -> dict[str, dict[str, Cell]]:
    """Map each format and application to whether the application reads files of the format."""
    from krona_hub.formats.compatibility.applications import APPLICATIONS
    from krona_hub.formats.known.registry import FORMATS

    return {format.name: {name: _cell(format.name, name) for name in APPLICATIONS} for format in FORMATS}


def _cell(format_name: str, application: str) -> Cell:
    from krona_hub.formats.compatibility.applications import APPLICATIONS, NOT_KNOWN
    from krona_hub.formats.known.registry import by_name

    known = APPLICATIONS[application]
    if reason := known.rejection(format_name):
        return Cell("?" if reason.startswith(NOT_KNOWN) else "–", reason.removeprefix(f"{NOT_KNOWN}: "))
    storage = by_name(format_name).storage
    if storage is not None and storage.kind == "kronecker" and any(rule.endswith("-splits") for rule in known.rules):
        return Cell("some", f"{known.title} loads only some shapes; krona inspect shows which")
    return Cell("yes", "")


class ModuleRow(NamedTuple):
    """Modules of a file with the same kind, factorization and scale."""

    modules: int
    kind: str
    factorization: str  # "r8", "8x8 ⊗ 40x40 r4"
    scale: str
    parameters: int
    dora_axis: str | None


def module_groups(modules: Sequence[ModuleInfo], most: int = 12) -> tuple[ModuleRow, ...]:
    """Group modules by kind, factorization and scale, largest group first; groups beyond `most` become one."""
    groups: dict[tuple[str, str, str, str | None], list[ModuleInfo]] = {}
    for m in modules:
        groups.setdefault((m.kind, factorization_text(m), scale_text(m), m.dora_axis), []).append(m)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    rows = [ModuleRow(len(ms), *key[:3], sum(m.parameters for m in ms), key[3]) for key, ms in ordered]
    if len(rows) > most:
        rest = rows[most - 1 :]
        total = sum(g.modules for g in rest), sum(g.parameters for g in rest)
        rows[most - 1 :] = [ModuleRow(total[0], "various", f"{len(rest)} other factorizations", "", total[1], None)]
    return tuple(rows)
