"""Turns what the library returns into plain values and words, for the screen and for JSON. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from krona_hub.rendering.humanize import form_in_words as form_in_words
from krona_hub.rendering.humanize import human_bytes as human_bytes
from krona_hub.rendering.humanize import percent as percent
from krona_hub.rendering.humanize import rate as rate
from krona_hub.rendering.humanize import relative as relative
from krona_hub.rendering.humanize import scale_in_words as scale_in_words

if TYPE_CHECKING:
    from krona_hub.conversion import LayerReport
    from krona_hub.formats.reading.describe import ModuleInfo


def plain(value: Any) -> Any:
    """The value as what JSON can hold: dataclasses and named tuples become objects, paths text, NaN null.

    >>> from pathlib import Path
    >>> from krona_hub.kron.shapes import KronShape
    >>> plain({"shape": KronShape(1, 2, 3, 4), "path": Path("a/b"), "error": float("nan")})
    {'shape': {'a1': 1, 'a2': 2, 'b1': 3, 'b2': 4}, 'path': 'a/b', 'error': None}
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(v) for name, v in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    return plain(value.value) if isinstance(value, Enum) else str(value)


class FormGroup(NamedTuple):
    """Layers that went from one form to another."""

    layers: int
    before: str
    after: str
    parameters_before: int
    parameters_after: int
    worst_error: float
    note: str  # that all of them have


def form_groups(layers: Sequence[LayerReport], most: int = 8) -> tuple[FormGroup, ...]:
    """The layers of a conversion by what they became, most layers first; what exceeds `most` groups is one group."""
    groups: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in layers:
        groups.setdefault((layer.before, layer.after), []).append(layer)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    if len(ordered) > most:
        rest = ordered[most - 1 :]
        ordered = [*ordered[: most - 1], (("various", f"{len(rest)} other forms"), [x for _, xs in rest for x in xs])]
    return tuple(_group(before, after, members) for (before, after), members in ordered)


def _group(before: str, after: str, members: Sequence[LayerReport]) -> FormGroup:
    parameters = sum(x.parameters_before for x in members), sum(x.parameters_after for x in members)
    notes = {x.note for x in members}
    note = notes.pop() if len(notes) == 1 else ""
    return FormGroup(len(members), before, after, *parameters, max(x.relative_error for x in members), note)


class FormatFacts(NamedTuple):
    """A format as `krona formats` lists it."""

    name: str
    reads: bool
    writes: bool
    summary: str


def format_facts() -> tuple[FormatFacts, ...]:
    """Every format of FORMATS, in its order."""
    from krona_hub.formats.known.registry import FORMATS

    return tuple(
        FormatFacts(spoke.NAME, hasattr(spoke, "read"), hasattr(spoke, "write"), _first_sentence(spoke.__doc__))
        for spoke in FORMATS
    )


def _first_sentence(text: str | None) -> str:
    sentence = (text or "").strip().split("\n\n")[0].replace("\n", " ")
    return re.sub(r" \(FORMATS.*?\)", "", sentence).rstrip(".")


class Cell(NamedTuple):
    """Whether a tool loads a format."""

    mark: str  # "yes", "some" (shapes; `krona inspect` says which) or "–"
    why: str


def loads_matrix() -> dict[str, dict[str, Cell]]:
    """Format -> tool -> whether the tool loads such files."""
    from krona_hub.formats.compatibility.tools import REJECTS, TOOLS

    return {name: {tool: _cell(name, tool) for tool in TOOLS} for name in REJECTS}


def _cell(format_name: str, tool: str) -> Cell:
    from krona_hub.formats.compatibility.format_limits import KRONECKER, no_dora
    from krona_hub.formats.compatibility.tools import REJECTS, TOOLS

    if reason := REJECTS[format_name].get(tool):
        return Cell("–", reason)
    if format_name in KRONECKER and any(rule is not no_dora for rule in TOOLS[tool].rules):
        return Cell("some", f"{TOOLS[tool].title} loads some shapes only; krona inspect says which")
    return Cell("yes", "")


class ModuleGroup(NamedTuple):
    """Modules of a file that look alike."""

    modules: int
    kind: str
    form: str  # "r8", "8x8 ⊗ 40x40 r4"
    scale: str
    parameters: int
    dora_axis: str | None


def module_groups(modules: Sequence[ModuleInfo], most: int = 12) -> tuple[ModuleGroup, ...]:
    """The modules by kind, form and scale, most modules first; what exceeds `most` groups is one group."""
    groups: dict[tuple[str, str, str, str | None], list[ModuleInfo]] = {}
    for m in modules:
        groups.setdefault((m.kind, form_in_words(m), scale_in_words(m), m.dora_axis), []).append(m)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    told = [ModuleGroup(len(ms), *key[:3], sum(m.parameters for m in ms), key[3]) for key, ms in ordered]
    if len(told) > most:
        rest = told[most - 1 :]
        whole = sum(g.modules for g in rest), sum(g.parameters for g in rest)
        told[most - 1 :] = [ModuleGroup(whole[0], "various", f"{len(rest)} other forms", "", whole[1], None)]
    return tuple(told)
