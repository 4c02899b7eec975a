"""Tables that map names of modules, norms and bare parameters of another program to diffusers paths.

A table is text with one name per line: the other name, then the diffusers path, then flags. `{}` is a block number;
a name may have several, the same on both sides, in the same order.

    a.qkv             a.(to_q|to_k|to_v)   the other module stacks these layers, in row order
    a.(up|gate)       a.proj               the layer stacks these other modules, in equal shares, in row order
    a.q               a.(to_q1&to_q2)      the other module is each of these layers, which therefore have equal weights
    a.mod             a.norm swap          a modulation of two chunks (scale, shift), stored in reverse order
    a.w1              a.proj halves        the two halves of the rows are stored in reverse order, whatever the shape
    a.w               a.proj transpose     the weight is stored as (in, out)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from krona_hub.bases.module_spec import ModuleSpec, Placement
from krona_hub.bases.name_patterns import template

NUMBER = re.compile(r"(?<![^.])(?:\d+|\{\})(?![^.])")  # a whole part of a dotted path, or its place in a rule
CHOICE = re.compile(r"(.*)\((.*)\)(.*)")
FLAGS = ("swap", "halves", "transpose")

Numbers = tuple[str, ...]


class Rule(NamedTuple):
    """One name of a table."""

    other: str
    parts: tuple[str, ...]  # diffusers paths, in row order
    swap: bool = False
    transpose: bool = False
    halves: bool = False
    shared: bool = False  # the other module is each of `parts`, rather than their stack
    share: tuple[int, int] = (0, 1)  # (i, n): the other module is share i of n equal ones of the rows of the layer


def parse(table: str) -> tuple[Rule, ...]:
    """Parse the text of a table.

    >>> [(rule.other, rule.parts) for rule in parse("blocks.{}.qkv  layers.{}.(to_q|to_k)")]
    [('blocks.{}.qkv', ('layers.{}.to_q', 'layers.{}.to_k'))]
    >>> [(rule.other, rule.share) for rule in parse("mlp.(up|gate)  ff.proj")]
    [('mlp.up', (0, 2)), ('mlp.gate', (1, 2))]
    """
    return tuple(rule for line in table.strip().splitlines() for rule in _rules(line))


def _rules(line: str) -> Iterator[Rule]:
    other, path, *flags = line.split()
    others, parts = _alternatives(other, "|"), _alternatives(path, "|")
    shared = len(parts) == 1 and "&" in path
    parts = _alternatives(path, "&") if shared else parts
    if not {*flags} <= {*FLAGS} or (len(others) > 1 and len(parts) > 1) or (len(parts) > 1 and flags and not shared):
        raise ValueError(f"not a line of a name table: {line!r}")  # a bug in a table
    for i, name in enumerate(others):
        share = i, len(others)
        yield Rule(name, parts, "swap" in flags, "transpose" in flags, "halves" in flags, shared, share)


def _alternatives(path: str, separator: str) -> tuple[str, ...]:
    choice = CHOICE.fullmatch(path)
    return tuple(choice[1] + part + choice[3] for part in choice[2].split(separator)) if choice else (path,)


def apply(rules: Sequence[Rule], modules: Mapping[str, ModuleSpec]) -> dict[str, tuple[Placement, ...]]:
    """Other name -> placements (layer: path within the component), for each rule and block that `modules` has."""
    blocks = _blocks(modules)
    found = {}
    for rule in rules:
        for numbers in _numbers(rule.parts[0], blocks):
            paths = [part.format(*numbers) for part in rule.parts]
            if all(path in modules for path in paths) and _divides(rule.share, modules[paths[0]]):
                found[rule.other.format(*numbers)] = _placements(rule, paths, modules)
    return found


def _blocks(modules: Mapping[str, ModuleSpec]) -> Mapping[str, list[Numbers]]:
    """Path with `{}` for each of its numbers -> the numbers of the modules with that path."""
    blocks: dict[str, list[Numbers]] = {}
    for path in modules:
        blocks.setdefault(NUMBER.sub("{}", path), []).append(tuple(NUMBER.findall(path)))
    return blocks


def _numbers(path: str, blocks: Mapping[str, list[Numbers]]) -> Iterator[Numbers]:
    """The block numbers for which a path of a rule exists; its other numbers, as in `to_out.0`, are fixed."""
    places = NUMBER.findall(path)
    fixed = [(i, number) for i, number in enumerate(places) if number != "{}"]
    free = [i for i, number in enumerate(places) if number == "{}"]
    for numbers in blocks.get(NUMBER.sub("{}", path), ()):
        if all(numbers[i] == number for i, number in fixed):
            yield tuple(numbers[i] for i in free)


def _placements(rule: Rule, paths: list[str], modules: Mapping[str, ModuleSpec]) -> tuple[Placement, ...]:
    first = modules[paths[0]]
    swap = rule.halves or (rule.swap and _two_chunks(first))
    if rule.shared:
        return tuple(
            Placement(path, None, swap, rule.transpose, None, tuple(p for p in paths if p != path)) for path in paths
        )
    if len(paths) == 1:
        return (Placement(paths[0], None, swap, rule.transpose, _part(rule.share, first)),)
    return tuple(Placement(path, rows) for path, rows in zip(paths, _rows(paths, modules), strict=True))


def _divides(share: tuple[int, int], module: ModuleSpec) -> bool:
    return share[1] == 1 or module.shape[0] % share[1] == 0


def _part(share: tuple[int, int], module: ModuleSpec) -> tuple[int, int] | None:
    own, count = share
    if count == 1:
        return None
    height = module.shape[0] // count
    return own * height, (own + 1) * height


def _rows(paths: list[str], modules: Mapping[str, ModuleSpec]) -> Iterator[tuple[int, int]]:
    heights = [modules[path].shape[0] for path in paths]
    return zip(accumulate(heights, initial=0), accumulate(heights), strict=False)


def _two_chunks(module: ModuleSpec) -> bool:
    """Whether a modulation has only scale and shift, (2·in, in); those of six or nine chunks are never swapped."""
    return module.shape[0] == 2 * module.shape[1]


Lookup = Mapping[str, Sequence[tuple[re.Pattern[str], Rule]]]  # template of an underscored name -> rules


def lookup_of(rules: Sequence[Rule]) -> Lookup:
    """Index rules by the other name, so that `find` needs no table of all blocks."""
    found: dict[str, list[tuple[re.Pattern[str], Rule]]] = {}
    for rule in rules:
        key = rule.other.replace(".", "_")
        pattern = re.compile(re.escape(key).replace(r"\{\}", r"(\d+)"))
        found.setdefault(template(key), []).append((pattern, rule))
    return found


def find(key: str, lookup: Lookup, modules: Mapping[str, ModuleSpec]) -> tuple[str, tuple[Placement, ...]] | None:
    """The dotted form and the placements of an underscored name: an entry of `apply`; None without one.

    >>> rules = lookup_of(parse("blocks.{}.qkv  layers.{}.(to_q|to_k)"))
    >>> name, places = find("blocks_7_qkv", rules, {f"layers.7.to_{x}": ModuleSpec((4, 4)) for x in "qk"})
    >>> name, [place.layer for place in places]
    ('blocks.7.qkv', ['layers.7.to_q', 'layers.7.to_k'])
    """
    for pattern, rule in lookup.get(template(key), ()):
        if match := pattern.fullmatch(key):
            paths = [part.format(*match.groups()) for part in rule.parts]
            if all(path in modules for path in paths) and _divides(rule.share, modules[paths[0]]):
                return rule.other.format(*match.groups()), _placements(rule, paths, modules)
    return None


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
    named = {f"{owner}.{name}": [f"{owner}.{part}" for part in FUSED[name]] for owner in owners for name in FUSED}
    return {name: places for name, paths in named.items() if (places := _fused(name, paths, modules))}


def find_fused(
    key: str, plain: Mapping[str, str], modules: Mapping[str, ModuleSpec]
) -> tuple[str, tuple[Placement, ...]] | None:
    """The dotted form and the placements of an underscored name: an entry of `fused_projections`; None without one.

    `plain` maps underscored to dotted paths.
    """
    name = next((name for name in FUSED if key.endswith(f"_{name}")), None)
    if name is None:
        return None
    paths = [plain.get(key.removesuffix(name) + part, "") for part in FUSED[name]]
    dotted = f"{paths[0].rpartition('.')[0]}.{name}"
    places = _fused(dotted, paths, modules)
    return (dotted, places) if places else None


def _fused(name: str, paths: list[str], modules: Mapping[str, ModuleSpec]) -> tuple[Placement, ...]:
    widths = {modules[path].shape[1:] if path in modules else () for path in paths}
    if len(widths) != 1 or () in widths or name in modules:
        return ()
    return tuple(Placement(path, rows) for path, rows in zip(paths, _rows(paths, modules), strict=True))
