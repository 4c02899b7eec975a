"""cloneofsimo/lora: modules known by their position only, with textual-inversion vectors.

The rules of the order are those of FORMATS §10.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from math import prod

from krona_hub.bases import catalogue
from krona_hub.bases.base import Base, Module, Placement
from krona_hub.errors import BaseMismatchError, IncompleteError, UnknownBaseError
from krona_hub.formats.layout import Layout
from krona_hub.formats.resolve import Landing
from krona_hub.formats.source import AdapterFile
from krona_hub.formats.spoke import Rules, verbs

NAME = "cloneofsimo"
SIDES = ("down_blocks", "up_blocks", "mid_block")  # diffusers of that time registered the middle last
PARTS = ("attentions", "resnets")  # within a block
BLOCK = (  # within a transformer block: ff is registered between the two attentions
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj",
    "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
)  # fmt: skip
RESNET = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")  # the extended variant only
CLIP = ("k_proj", "v_proj", "q_proj", "out_proj")
ATTENTION_PATH = re.compile(rf"({'|'.join(SIDES)})\.(?:(\d+)\.)?(attentions)\.(\d+)\.transformer_blocks\.(\d+)\.(.+)")
RESNET_PATH = re.compile(rf"({'|'.join(SIDES)})\.(?:(\d+)\.)?(resnets)\.(\d+)()\.(.+)")
CLIP_PATH = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.(.+)")

Rank = tuple[int, ...]


def recognises(file: AdapterFile) -> bool:
    return "cloneofsimo" in file.keys.grammars


def unet_order(modules: Mapping[str, Module], extended: bool = False) -> tuple[str, ...]:
    """The module paths of a U-Net in the order in which this trainer numbered them.

    >>> from krona_hub.bases import catalogue
    >>> order = unet_order(catalogue.get("sd15").components["unet"])
    >>> len(order), order[4], order[-1]
    (144, 'down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj', \
'mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0')
    """
    ranked = [(rank, path) for path in modules if (rank := _unet_rank(path, extended)) is not None]
    return tuple(path for _, path in sorted(ranked))


def _unet_rank(path: str, extended: bool) -> Rank | None:
    for pattern, members in ((ATTENTION_PATH, BLOCK), (RESNET_PATH, RESNET)):
        found = pattern.fullmatch(path)
        if found and found[6] in members and (extended or members is BLOCK):
            side, block, part, index, inner, member = found.groups()
            numbers = int(block or 0), PARTS.index(part), int(index), int(inner or 0)
            return SIDES.index(side), *numbers, members.index(member)
    return None


def clip_order(modules: Mapping[str, Module]) -> tuple[str, ...]:
    """The attention projections of a CLIP text encoder in the order in which this trainer numbered them."""
    found = [(m, path) for path in modules if (m := CLIP_PATH.fullmatch(path)) and m[2] in CLIP]
    return tuple(path for _, path in sorted(((int(m[1]), CLIP.index(m[2])), path) for m, path in found))


def land(file: AdapterFile, layouts: Mapping[str, Layout]) -> Landing:
    """Give every position its layer: in the base of the file, or in the bases of the catalogue whose every shape fits.

    Raises BaseMismatchError where a shape or the number of modules differs, UnknownBaseError where no base fits.
    """
    extended = "ResnetBlock2D" in _classes(file)
    if file.base is not None:
        return _landing(file.base, layouts, extended, (file.base.family,) if file.base.family else ())
    fits = [b for b in map(catalogue.get, catalogue.names()) if not _misfits(b, layouts, extended)]
    if not fits:
        raise UnknownBaseError(
            f"no known base has the order and the shapes of its {len(layouts)} modules.",
            fix="These files know modules by position only: give the base it was trained on with --base.",
        )
    return _landing(fits[0], layouts, extended, tuple(b.name for b in fits))


def _landing(base: Base, layouts: Mapping[str, Layout], extended: bool, candidates: tuple[str, ...]) -> Landing:
    wrong = _misfits(base, layouts, extended)
    if wrong:
        raise BaseMismatchError(
            f"{len(wrong)} of {len(layouts)} positions do not fit {base.name}; the first is {wrong[0]}.",
            fix="Give the base it was trained on with --base.",
        )
    places = {name: (Placement(layer),) for name, layer in _layers(base, layouts, extended)}
    return Landing(base, candidates, places, {})


def _misfits(base: Base, layouts: Mapping[str, Layout], extended: bool) -> list[str]:
    """Positions whose shape is not that of their layer, or that have none; for each component, the count must fit."""
    found = dict(_layers(base, layouts, extended))
    missing = [name for name in layouts if name not in found]
    counts = [f"the number of {c} modules" for c in _components(layouts) if not _counted(base, layouts, c, extended)]
    return missing + counts + [n for n, layer in found.items() if _differs(base.module(layer), layouts[n])]


def _differs(module: Module | None, layout: Layout) -> bool:
    shape = layout.weight_shape
    return module is None or (shape[0], prod(shape[1:])) != module.matrix


def _components(layouts: Mapping[str, Layout]) -> tuple[str, ...]:
    return tuple(sorted({name.partition(":")[0] for name in layouts}))


def _counted(base: Base, layouts: Mapping[str, Layout], component: str, extended: bool) -> bool:
    positions = {int(name.partition(":")[2]) for name in layouts if name.startswith(f"{component}:")}
    return positions == set(range(len(_order(base, component, extended))))


def _layers(base: Base, layouts: Mapping[str, Layout], extended: bool) -> Iterator[tuple[str, str]]:
    """Position -> canonical layer."""
    for component in _components(layouts):
        for i, path in enumerate(_order(base, component, extended)):
            if f"{component}:{i}" in layouts:
                yield f"{component}:{i}", f"{component}.{path}"


def _order(base: Base, component: str, extended: bool) -> tuple[str, ...]:
    modules = base.components.get(component, {})
    return unet_order(modules, extended) if component == "unet" else clip_order(modules)


def _classes(file: AdapterFile) -> tuple[str, ...]:
    """The class names in the metadata, which say whether the ResNet blocks were trained too."""
    try:
        names = json.loads(file.metadata.get("unet", "[]"))
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list):
        raise IncompleteError("its metadata entry 'unet' is no list of class names.", fix="Save the adapter again.")
    return tuple(map(str, names))


RULES = Rules(scale="1", land=land)
read, describe, _ = verbs(NAME)
