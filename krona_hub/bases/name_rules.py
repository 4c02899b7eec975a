"""Tables that map names of modules, norms and bare parameters of another program to diffusers paths.

A table is text with one name per line: the other name, then the diffusers path, both with `{}` for the block
number. `(a|b|c)` lists the layers that the other module stacks, in row order; `swap` marks a module of two chunks
(scale, shift) stored in reverse order; `transpose` marks a weight stored as (in, out).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from typing import NamedTuple

from krona_hub.bases.module_spec import ModuleSpec, Placement

FIRST_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Rule(NamedTuple):
    """One line of a table."""

    other: str
    parts: tuple[str, ...]  # diffusers paths, in row order
    swap: bool = False
    transpose: bool = False


def parse(table: str) -> tuple[Rule, ...]:
    """Parse the text of a table.

    >>> parse("blocks.{}.qkv  layers.{}.(to_q|to_k)")
    (Rule(other='blocks.{}.qkv', parts=('layers.{}.to_q', 'layers.{}.to_k'), swap=False, transpose=False),)
    """
    rules = []
    for line in table.strip().splitlines():
        other, path, *flags = line.split()
        rules.append(Rule(other, _alternatives(path), "swap" in flags, "transpose" in flags))
    return tuple(rules)


def _alternatives(path: str) -> tuple[str, ...]:
    stacked = re.fullmatch(r"(.*)\((.*)\)", path)
    return tuple(stacked[1] + part for part in stacked[2].split("|")) if stacked else (path,)


def apply(rules: tuple[Rule, ...], modules: Mapping[str, ModuleSpec]) -> dict[str, tuple[Placement, ...]]:
    """Other name -> placements (layer: path within the component), for each rule and block that `modules` has."""
    blocks = _blocks(modules)
    return {
        rule.other.format(i): _placements(rule, [part.format(i) for part in rule.parts], modules)
        for rule in rules
        for i in blocks.get(rule.parts[0].partition("{}")[0], ())
        if all(part.format(i) in modules for part in rule.parts)
    }


def _blocks(modules: Mapping[str, ModuleSpec]) -> Mapping[str, Iterable[int]]:
    """Prefix before the first number of a path -> numbers that follow it; a path without a number -> 0."""
    blocks: dict[str, dict[int, None]] = {}  # a dict keeps the order
    for path in modules:
        blocks[path] = {0: None}
        if number := FIRST_NUMBER.search(path):
            blocks.setdefault(path[: number.start()], {})[int(number[0])] = None
    return blocks


def _placements(rule: Rule, paths: list[str], modules: Mapping[str, ModuleSpec]) -> tuple[Placement, ...]:
    swap = rule.swap and _two_chunks(modules[paths[0]])
    if len(paths) == 1:
        return (Placement(paths[0], None, swap, rule.transpose),)
    return tuple(Placement(path, rows) for path, rows in zip(paths, _rows(paths, modules), strict=True))


def _rows(paths: list[str], modules: Mapping[str, ModuleSpec]) -> Iterator[tuple[int, int]]:
    heights = [modules[path].shape[0] for path in paths]
    return zip(accumulate(heights, initial=0), accumulate(heights), strict=False)


def _two_chunks(module: ModuleSpec) -> bool:
    """Whether a modulation has only scale and shift, (2·in, in); those of six or nine chunks are never swapped."""
    return module.shape[0] == 2 * module.shape[1]


FUSED = {  # what diffusers and SimpleTuner call stacked projections -> the layers, in row order
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}


def fused_projections(modules: Mapping[str, ModuleSpec]) -> dict[str, tuple[Placement, ...]]:
    """Name after `fuse_qkv_projections()` of diffusers -> placements, for every attention with inputs of one size.

    >>> attention = {f"attn.to_{x}": ModuleSpec((rows, 4)) for x, rows in (("q", 6), ("k", 2), ("v", 2))}
    >>> [(place.layer, place.rows) for place in fused_projections(attention)["attn.to_qkv"]]
    [('attn.to_q', (0, 6)), ('attn.to_k', (6, 8)), ('attn.to_v', (8, 10))]
    """
    owners = {path.rpartition(".")[0] for path in modules if path.endswith((".to_k", ".add_k_proj"))}
    found = {}
    for owner in owners:
        for name, parts in FUSED.items():
            paths = [f"{owner}.{part}" for part in parts]
            widths = {modules[path].shape[1:] if path in modules else () for path in paths}
            if len(widths) == 1 and () not in widths and f"{owner}.{name}" not in modules:
                places = zip(paths, _rows(paths, modules), strict=True)
                found[f"{owner}.{name}"] = tuple(Placement(path, rows) for path, rows in places)
    return found
