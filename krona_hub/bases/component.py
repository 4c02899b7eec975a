"""One component of a base model: its modules by path, and what their names say of its architecture."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from krona_hub.bases.module_spec import ModuleSpec
from krona_hub.bases.original_names import Original, original_of


class Component(dict[str, ModuleSpec]):
    """Module path -> ModuleSpec. Not to be changed: what the names say is computed once.

    >>> Component({"encoder.layers.0.self_attn.q_proj": ModuleSpec((8, 8))}).kind
    'clip'
    """

    @cached_property
    def kind(self) -> Literal["clip", "t5", ""]:
        """`clip` or `t5` for those text encoders, "" for every other model."""
        if "encoder.layers.0.self_attn.q_proj" in self:
            return "clip"
        return "t5" if "encoder.block.0.layer.0.SelfAttention.q" in self else ""

    @cached_property
    def original(self) -> Original | None:
        """How its authors call its modules; None where that is not listed (U-Nets follow a rule, in `ldm_names.py`)."""
        return original_of(self)
