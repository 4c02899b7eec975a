"""cloneofsimo/lora: modules identified by position only, with textual-inversion vectors.

FORMATS §10 states the rules of the module order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from krona_hub.bases import catalog
from krona_hub.bases.base import Base
from krona_hub.bases.component import Component
from krona_hub.bases.module_spec import ModuleSpec, Placement
from krona_hub.errors import BaseMismatchError, IncompleteError, UnknownBaseError
from krona_hub.formats.known.format import Format
from krona_hub.formats.parsing.adapter_file import AdapterFile
from krona_hub.formats.parsing.base_match import BaseMatch
from krona_hub.formats.parsing.module_layout import ModuleLayout

SIDES = ("down_blocks", "up_blocks", "mid_block")  # diffusers registered the middle block last at that time
PARTS = ("attentions", "resnets")  # within a block
BLOCK = (  # within a transformer block: ff is registered between the two attentions
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj",
    "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
)  # fmt: skip
RESNET = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")
ATTENTION_CLASSES = frozenset({"CrossAttention", "Attention"})
CLASSES = ATTENTION_CLASSES | {"GEGLU"}  # trained classes, if the file does not state them
OWNERS: Mapping[str, frozenset[str]] = {  # start of a member name -> classes that include it
    "attn": ATTENTION_CLASSES,
    "ff": frozenset({"GEGLU"}),
    "": frozenset({"ResnetBlock2D"}),  # the extended variant
}
CLIP = ("k_proj", "v_proj", "q_proj", "out_proj")
ATTENTION_PATH = re.compile(rf"({'|'.join(SIDES)})\.(?:(\d+)\.)?(attentions)\.(\d+)\.transformer_blocks\.(\d+)\.(.+)")
RESNET_PATH = re.compile(rf"({'|'.join(SIDES)})\.(?:(\d+)\.)?(resnets)\.(\d+)()\.(.+)")
CLIP_PATH = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.(.+)")

Rank = tuple[int, ...]


def recognizes(file: AdapterFile) -> bool:
    return "cloneofsimo" in file.keys.grammars


def unet_order(modules: Mapping[str, ModuleSpec], classes: frozenset[str] = CLASSES) -> tuple[str, ...]:
    """The module paths of a U-Net in this trainer's numbering, for the trained `classes`.

    >>> order = unet_order(catalog.get("sd15").components["unet"])
    >>> len(order), order[4], order[-1]
    (144, 'down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj', \
'mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0')
    """
    ranked = [(rank, path) for path in modules if (rank := _unet_rank(path, classes)) is not None]
    return tuple(path for _, path in sorted(ranked))


def _unet_rank(path: str, classes: frozenset[str]) -> Rank | None:
    for pattern, members in ((ATTENTION_PATH, BLOCK), (RESNET_PATH, RESNET)):
        found = pattern.fullmatch(path)
        if found and found[6] in members and _owners(found[6]) & classes:
            side, block, part, index, inner, member = found.groups()
            numbers = int(block or 0), PARTS.index(part), int(index), int(inner or 0)
            return SIDES.index(side), *numbers, members.index(member)
    return None


def _owners(member: str) -> frozenset[str]:
    return next(classes for start, classes in OWNERS.items() if member.startswith(start))


def clip_order(modules: Mapping[str, ModuleSpec]) -> tuple[str, ...]:
    """The attention projections of a CLIP text encoder in this trainer's numbering."""
    found = [(m, path) for path in modules if (m := CLIP_PATH.fullmatch(path)) and m[2] in CLIP]
    return tuple(path for _, path in sorted(((int(m[1]), CLIP.index(m[2])), path) for m, path in found))


def match_base(file: AdapterFile, layouts: Mapping[str, ModuleLayout]) -> BaseMatch:
    """Assign a layer to every position: in the base model of the file, or in the first of the catalog that fits.

    Raises BaseMismatchError if a shape or the number of modules differs, UnknownBaseError if no base model fits.
    """
    numbered = Numbered(frozenset(m.name for m in file.keys.modules), layouts, _classes(file))
    if file.base is not None:
        _check(numbered, file.base)
        fits = [file.base]
    else:
        fits = [base for base in map(catalog.get, catalog.names()) if not numbered.misfits(base)]
    if not fits:
        raise UnknownBaseError(
            f"No known base model matches the order and the shapes of the {len(numbered.names)} modules.",
            fix="Files of this format identify modules by position only: specify the base model with --base.",
        )
    places = {name: (Placement(layer),) for name, layer in numbered.layers(fits[0]).items() if name in layouts}
    return BaseMatch(fits[0], tuple(base.family for base in fits if base.family), places, {})


@dataclass(frozen=True)
class Numbered:
    """The modules of a file, identified by their positions."""

    names: frozenset[str]  # such as "unet:3"
    layouts: Mapping[str, ModuleLayout]  # of valid modules only
    classes: frozenset[str]  # trained classes

    def layers(self, base: Base) -> dict[str, str]:
        """Position -> canonical layer, for the components that the file adapts."""
        touched = {name.partition(":")[0] for name in self.names}
        orders = {c: _order(base, c, self.classes) for c in ("text_encoder", "unet") if c in touched}
        return {f"{c}:{i}": f"{c}.{path}" for c, order in orders.items() for i, path in enumerate(order)}

    def misfits(self, base: Base) -> list[str]:
        """Positions that exist only in the file or only in the base model, and positions with different sizes."""
        layers = self.layers(base)
        differ = [
            n for n, layer in layers.items() if n in self.layouts and _differs(base.module(layer), self.layouts[n])
        ]
        return sorted(self.names ^ layers.keys()) + differ


def _check(numbered: Numbered, base: Base) -> None:
    wrong = numbered.misfits(base)
    if wrong:
        raise BaseMismatchError(
            f"{len(wrong)} positions do not match {base.name}; the first is {wrong[0]}.",
            fix="Specify the base model the adapter was trained on with --base.",
        )


def _differs(module: ModuleSpec | None, layout: ModuleLayout) -> bool:
    shape = layout.weight_shape
    return module is None or (shape[0], prod(shape[1:])) != module.matrix


def _order(base: Base, component: str, classes: frozenset[str]) -> tuple[str, ...]:
    modules = base.components.get(component, Component())
    return unet_order(modules, classes) if component == "unet" else clip_order(modules)


def _classes(file: AdapterFile) -> frozenset[str]:
    """The trained class names from the metadata."""
    try:
        names = json.loads(file.metadata.get("unet", "[]"))
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list):
        raise IncompleteError("The metadata entry 'unet' is not a list of class names.", fix="Save the adapter again.")
    return frozenset(map(str, names)) or CLASSES


CLONEOFSIMO = Format(
    name="cloneofsimo",
    summary="cloneofsimo/lora: modules identified by position only, with textual-inversion vectors",
    recognizes=recognizes,
    scale="1",
    storage=None,
    match_base=match_base,
)
