"""One component of a base model: its modules by path, and the architecture that their names imply."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from krona_hub.bases.module_spec import ModuleSpec
from krona_hub.bases.original_names import Original, original_of


class Component(dict[str, ModuleSpec]):
    """Module path -> ModuleSpec. Do not modify: properties are cached.

    >>> Component({"encoder.layers.0.self_attn.q_proj": ModuleSpec((8, 8))}).kind
    'clip'
    """

    @cached_property
    def kind(self) -> Literal["clip", "t5", ""]:
        """`clip` or `t5` for those text encoders; "" for every other model."""
        if "encoder.layers.0.self_attn.q_proj" in self:
            return "clip"
        return "t5" if "encoder.block.0.layer.0.SelfAttention.q" in self else ""

    @cached_property
    def original(self) -> Original | None:
        """The original architecture and its module names; None if not listed (for U-Nets see `ldm_names`)."""
        return original_of(self)
