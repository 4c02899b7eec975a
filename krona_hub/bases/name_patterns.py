"""A compact, lossless notation for thousands of module names: `blocks.{0-18}.attn.to_q` -> `3072x3072b`.

A pattern expands to the product of the numbers in its braces. A shape is the sizes of the weight joined by `x`,
then `b` if the module has a bias, and `gN` if a convolution has N groups.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, product

from krona_hub.bases.module_spec import ModuleSpec

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole segment of digits
SHAPE = re.compile(r"(|\d+(?:x\d+)*)(b?)(?:g(\d+))?")  # "" is the shape of a scalar

Box = tuple[frozenset[int], ...]  # a product of sets of numbers, one per index of a name


def template(key: str) -> str:
    """An underscored name with `#` for every number that is a word of its own, and for every place of a number.

    >>> template("double_blocks_11_img_mlp_0"), template("blocks_3_attn1_to_q"), template("blocks_{}_attn1_to_q")
    ('double_blocks_#_img_mlp_#', 'blocks_#_attn1_to_q', 'blocks_#_attn1_to_q')
    """
    return "_".join("#" if word.isdigit() or word == "{}" else word for word in key.split("_"))


def encode_module(module: ModuleSpec) -> str:
    """Encode the shape, bias and groups of a module.

    >>> encode_module(ModuleSpec((320, 4, 3, 3))), encode_module(ModuleSpec((640, 1, 3, 3), False, 640))
    ('320x4x3x3b', '640x1x3x3g640')
    """
    groups = f"g{module.groups}" if module.groups > 1 else ""
    return "x".join(map(str, module.shape)) + "b" * module.bias + groups


def parse_module(text: str) -> ModuleSpec:
    """The inverse of `encode_module`."""
    match = SHAPE.fullmatch(text)
    if match is None:
        raise ValueError(f"Invalid module shape {text!r}.")  # an error in the shipped catalog, not in user data
    sizes, bias, groups = match.groups()
    return ModuleSpec(tuple(map(int, sizes.split("x"))) if sizes else (), bool(bias), int(groups or 1))


def encode(modules: Mapping[str, ModuleSpec]) -> dict[str, str]:
    """Encode module names as patterns: pattern -> encoded module.

    >>> two_by_two = {f"a.{i}.b.{j}": ModuleSpec((2, 2)) for i in (0, 1) for j in (0, 2, 3)}
    >>> encode(two_by_two)
    {'a.{0-1}.b.{0,2-3}': '2x2b'}
    """
    indices: dict[tuple[str, str], list[Box]] = defaultdict(list)
    for name, module in modules.items():
        key = NUMBER.sub("{}", name), encode_module(module)
        indices[key].append(tuple(frozenset([int(n)]) for n in NUMBER.findall(name)))
    return {template.format(*map(_braces, box)): s for (template, s), boxes in indices.items() for box in _join(boxes)}


def expand(patterns: Mapping[str, str]) -> dict[str, ModuleSpec]:
    """The inverse of `encode`.

    >>> list(expand({"a.{0-1}.b.{0,2}": "2x2b"}))
    ['a.0.b.0', 'a.0.b.2', 'a.1.b.0', 'a.1.b.2']
    """
    modules = {}
    for pattern, text in patterns.items():
        module = parse_module(text)
        for name in _names(pattern):
            modules[name] = module
    return modules


def _names(pattern: str) -> Iterator[str]:
    pieces = re.split(r"\{([^}]*)\}", pattern)  # text, braces, text, …
    options = [list(_numbers(p)) if i % 2 else [p] for i, p in enumerate(pieces)]
    return map("".join, product(*options))


def _numbers(text: str) -> Iterator[str]:
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from map(str, range(int(first), int(last or first) + 1))


def _braces(numbers: Iterable[int]) -> str:
    """Sorted numbers as ranges: {0, 1, 2, 5} -> `{0-2,5}`, one number as itself."""
    runs = [list(run) for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])]
    spans = [(run[0][1], run[-1][1]) for run in runs]
    if len(spans) == 1 and spans[0][0] == spans[0][1]:
        return str(spans[0][0])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) + "}"


def _join(boxes: list[Box]) -> list[Box]:
    """Merge boxes that differ along one axis only, so that fewer boxes contain the same points."""
    for axis in reversed(range(len(boxes[0]))):
        merged: dict[Box, frozenset[int]] = {}
        for box in boxes:
            rest = box[:axis] + box[axis + 1 :]
            merged[rest] = merged.get(rest, frozenset()) | box[axis]
        boxes = [(*rest[:axis], numbers, *rest[axis:]) for rest, numbers in merged.items()]
    return boxes
