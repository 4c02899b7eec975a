"""Turns what the library returns into plain values and words, for the screen and for JSON. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from krona_hub.conversion import LayerReport
    from krona_hub.formats.describe import ModuleInfo
    from krona_hub.formats.forms import SumForm


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


def human_bytes(count: int) -> str:
    """A size in the unit a person would choose, decimal.

    >>> human_bytes(512), human_bytes(3_227_336), human_bytes(5_500_000_000)
    ('512 B', '3.2 MB', '5.5 GB')
    """
    size, units = float(count), ["B", "kB", "MB", "GB"]
    while size >= 999.95 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def percent(share: float) -> str:
    """A share of one as a percentage that keeps nearly nothing apart from nothing, and nearly all from all.

    >>> percent(0.5), percent(0.0123), percent(0.00004), percent(0.0)
    ('50 %', '1.2 %', '0.004 %', '0 %')
    >>> percent(0.99884), percent(1.0)
    ('99.9 %', '100 %')
    """
    if share > 0.99:
        return f"{100 - float(f'{100 * (1 - share):.1g}'):.9g} %"
    return f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.0f} %"


def relative(error: float) -> str:
    """A relative error in few characters.

    >>> relative(0.0), relative(3.2e-7), relative(0.0487)
    ('0', '3.2e-07', '0.049')
    """
    return "0" if error == 0 else f"{error:.2g}"


def rate(nbytes: int, seconds: float) -> str:
    """How long it took, and how fast where that means something.

    >>> rate(5_100_000_000, 3.4), rate(20_000, 0.003)
    ('3.4 s, 1.5 GB/s', '0.0 s')
    """
    speed = f", {human_bytes(round(nbytes / seconds))}/s" if nbytes > 100_000_000 and seconds > 0 else ""
    return f"{seconds:.1f} s{speed}"


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


def worst_layers(layers: Sequence[LayerReport], most: int = 3) -> tuple[LayerReport, ...]:
    """The layers with the largest relative error, worst first; none where nothing was lost."""
    from krona_hub.conversion.report import EXACT_BELOW

    lossy = [x for x in layers if x.relative_error > EXACT_BELOW]
    return tuple(sorted(lossy, key=lambda x: (-x.relative_error, x.layer))[:most])


class FormatFacts(NamedTuple):
    """A format as `krona formats` lists it."""

    name: str
    reads: bool
    writes: bool
    summary: str


def format_facts() -> tuple[FormatFacts, ...]:
    """Every format of FORMATS, in its order."""
    from krona_hub.formats.registry import FORMATS

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
    from krona_hub.formats.tools import REJECTS, TOOLS

    return {name: {tool: _cell(name, tool) for tool in TOOLS} for name in REJECTS}


def _cell(format_name: str, tool: str) -> Cell:
    from krona_hub.formats.forms import KRONECKER, no_dora
    from krona_hub.formats.tools import REJECTS, TOOLS

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


def form_in_words(module: ModuleInfo) -> str:
    """The form of a module as the tables show it: rank of a LoRA, split, terms and ranks of a Kronecker sum."""
    return " + ".join(_sum_in_words(s) for s in module.sums) or "magnitude only"


def _sum_in_words(s: SumForm) -> str:
    if (s.shape.a1, s.shape.a2) == (1, 1) and s.right_rank is not None:
        return f"{s.shape.b1}x{s.shape.b2} r{s.right_rank}"
    terms = f"{s.terms} terms of " if s.terms > 1 else ""
    ranks = [f"{side} r{rank}" for side, rank in (("A", s.left_rank), ("B", s.right_rank)) if rank is not None]
    rows = ["rows shuffled"] if s.rows == "shuffled" else []
    return ", ".join([f"{terms}{s.shape}", *ranks, *rows])


def scale_in_words(module: ModuleInfo) -> str:
    """`alpha 4 / rank 8 = 0.5`, or the scale alone where no alpha is involved."""
    if module.alpha is None or module.rank is None:
        return f"{module.scale:g}"
    return f"alpha {module.alpha:g} / rank {module.rank} = {module.scale:g}"
