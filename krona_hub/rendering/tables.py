"""Turns what the library returns into plain values and words, for the screen and for JSON. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from krona_hub.formats.reading.description import factorization_text, scale_text

if TYPE_CHECKING:
    from krona_hub.conversion import LayerReport
    from krona_hub.formats.reading.description import ModuleInfo


class FactorizationGroup(NamedTuple):
    """Layers that went from one form to another."""

    layers: int
    before: str
    after: str
    parameters_before: int
    parameters_after: int
    worst_error: float
    note: str  # that all of them have


def factorization_groups(layers: Sequence[LayerReport], most: int = 8) -> tuple[FactorizationGroup, ...]:
    """The layers of a conversion by what they became, most layers first; what exceeds `most` groups is one group."""
    groups: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault((layer.before, layer.after), []).append(layer)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    if len(ordered) > most:
        rest = ordered[most - 1 :]
        ordered = [*ordered[: most - 1], (("various", f"{len(rest)} other forms"), [x for _, xs in rest for x in xs])]
    return tuple(_group(before, after, members) for (before, after), members in ordered)


def _group(before: str, after: str, members: Sequence[LayerReport]) -> FactorizationGroup:
    parameters = sum(x.parameters_before for x in members), sum(x.parameters_after for x in members)
    notes = {x.note for x in members}
    note = notes.pop() if len(notes) == 1 else ""
    return FactorizationGroup(len(members), before, after, *parameters, max(x.relative_error for x in members), note)


class FormatFacts(NamedTuple):
    """A format as `krona formats` lists it."""

    name: str
    reads: bool
    writes: bool
    summary: str


def format_facts() -> tuple[FormatFacts, ...]:
    """Every format of FORMATS, in its order."""
    from krona_hub.formats.known.registry import FORMATS

    return tuple(FormatFacts(format.name, True, format.writes, format.summary) for format in FORMATS)


class Cell(NamedTuple):
    """Whether a tool loads a format."""

    mark: str  # "yes", "some" (shapes; `krona inspect` says which) or "–"
    why: str


def loads_matrix() -> dict[str, dict[str, Cell]]:
    """Format -> tool -> whether the tool loads such files."""
    from krona_hub.formats.compatibility.tools import REJECTS, TOOLS
    from krona_hub.formats.known.registry import FORMATS

    known = dict.fromkeys((*REJECTS, *(format.name for format in FORMATS)))
    return {name: {tool: _cell(name, tool) for tool in TOOLS} for name in known}


def _cell(format_name: str, tool: str) -> Cell:
    from krona_hub.formats.compatibility.tools import TOOLS, rejection
    from krona_hub.formats.forms.limits import no_dora
    from krona_hub.formats.known.registry import by_name

    if reason := rejection(format_name, tool):
        return Cell("–", reason)
    storage = by_name(format_name).storage
    if storage is not None and storage.kind == "kronecker" and any(rule is not no_dora for rule in TOOLS[tool].rules):
        return Cell("some", f"{TOOLS[tool].title} loads some shapes only; krona inspect says which")
    return Cell("yes", "")


class ModuleRow(NamedTuple):
    """Modules of a file that look alike."""

    modules: int
    kind: str
    form: str  # "r8", "8x8 ⊗ 40x40 r4"
    scale: str
    parameters: int
    dora_axis: str | None


def module_groups(modules: Sequence[ModuleInfo], most: int = 12) -> tuple[ModuleRow, ...]:
    """The modules by kind, form and scale, most modules first; what exceeds `most` groups is one group."""
    groups: dict[tuple[str, str, str, str | None], list[ModuleInfo]] = {}
    for m in modules:
        groups.setdefault((m.kind, factorization_text(m), scale_text(m), m.dora_axis), []).append(m)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    told = [ModuleRow(len(ms), *key[:3], sum(m.parameters for m in ms), key[3]) for key, ms in ordered]
    if len(told) > most:
        rest = told[most - 1 :]
        whole = sum(g.modules for g in rest), sum(g.parameters for g in rest)
        told[most - 1 :] = [ModuleRow(whole[0], "various", f"{len(rest)} other forms", "", whole[1], None)]
    return tuple(told)
