"""Layers of a file whose base model is unknown, from the names of its modules alone. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from krona_hub.adapters.unknown_base import UNKNOWN, unknown_layer
from krona_hub.bases.base import COMPONENTS, Base
from krona_hub.bases.module_spec import Placement

WRAPPER = "base_model.model."  # of all names in a PEFT folder
SIGNS: tuple[tuple[re.Pattern[str], str], ...] = (  # start of a diffusers or transformers path -> component
    (re.compile(r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\b"), "unet"),
    (re.compile(r"(single_|joint_)?transformer_blocks\."), "transformer"),
    (re.compile(r"(text_model\.)?encoder\.layers\."), "text_encoder"),
)
OLD_PATHS = (  # attention-processor names, as in `bases.name_table`, for paths without a known base
    (re.compile(r"^(text_encoder.*self_attn\.)to_([qkv]|out)$"), r"\1\2_proj"),
    (re.compile(r"^(.*attn\d?)\.processor\.to_out$"), r"\1.to_out.0"),
    (re.compile(r"^(.*)\.processor\.(.*)$"), r"\1.\2"),
    (re.compile(r"^(text_encoder[^.]*\.)text_model\."), r"\1"),
)


@dataclass(frozen=True)
class OwnNames:
    """How the modules of a file without a known base model become layers.

    Names that state their component are canonical paths; all others are kept as they are.
    """

    component: str | None = None  # of names that state none
    is_peft: bool = False  # the file is part of a PEFT folder, whose names have a wrapper
    guesses: bool = False  # whether names that state no component show it by their first segment

    def layer(self, name: str) -> str:
        """Return the layer of a module, or of the owner of a vector."""
        path = name.removeprefix(WRAPPER)
        if self.guesses or path.partition(".")[0] in COMPONENTS:
            found = canonical_from_path(name, self.component)
            if found is not None:
                return found
        return unknown_layer(path if self.is_peft else name)


def own_names(names: Iterable[str], component: str | None, *, is_peft: bool) -> OwnNames:
    """Return the rule for these modules: their components are guessed only if every name shows one."""
    return OwnNames(component, is_peft, all(canonical_from_path(name, component) for name in names))


def kept_place(base: Base, name: str) -> tuple[Placement, ...] | None:
    """Return the place of a module that has its own name in `base`, the layers of an adapter; None if there is none."""
    own = base.components.get(UNKNOWN)
    if own is None:
        return None
    readings = (name, name.removeprefix(WRAPPER), f"{WRAPPER}{name.removeprefix(WRAPPER)}")
    found = next((path for path in readings if path in own or path in own.norms), None)
    return None if found is None else (Placement(unknown_layer(found)),)


def canonical_from_path(name: str, component: str | None = None) -> str | None:
    """The canonical layer that a dotted name contains; None if the name needs a base model.

    >>> canonical_from_path("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out")
    'unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0'
    >>> canonical_from_path("lora_unet_mid_block_attentions_0_proj_in") is None
    True
    """
    path = name.removeprefix(WRAPPER)
    if path.partition(".")[0] not in COMPONENTS:
        owner = component or next((c for sign, c in SIGNS if sign.match(path)), None)
        if owner is None or "." not in path:
            return None
        path = f"{owner}.{path}"
    for old, new in OLD_PATHS:
        path = old.sub(new, path)
    return path
