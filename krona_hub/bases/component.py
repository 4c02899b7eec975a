"""One component of a base model: its modules by path, its norms, and the architecture that their names imply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Literal

from krona_hub.bases.module_spec import ModuleSpec, OtherParameters
from krona_hub.bases.original_names import Original, original_of


class Component(dict[str, ModuleSpec]):
    """Module path -> ModuleSpec of every layer. Do not modify: properties are cached.

    Norms and bare parameters are separate: `others` is called when one of them is first needed.

    >>> Component({"encoder.layers.0.self_attn.q_proj": ModuleSpec((8, 8))}).kind
    'clip'
    """

    def __init__(
        self,
        modules: Mapping[str, ModuleSpec] | Iterable[tuple[str, ModuleSpec]] = (),
        others: Callable[[], OtherParameters] = OtherParameters,
    ) -> None:
        super().__init__(modules)
        self.others = others

    @cached_property
    def norms(self) -> Mapping[str, ModuleSpec]:
        """Norms by module path, and bare parameters by their full path, such as `blocks.0.scale_shift_table`."""
        norms, bare = self._others
        return {**norms, **bare}

    @cached_property
    def bare(self) -> Mapping[str, ModuleSpec]:
        """The members of `norms` that are parameters themselves, rather than modules with a weight."""
        return self._others.bare

    @cached_property
    def _others(self) -> OtherParameters:
        return self.others()

    def parameter(self, path: str) -> tuple[int, ...] | None:
        """The shape of a bias, of the weight of a norm or of a bare parameter; None if there is none.

        >>> norms = OtherParameters({"norm": ModuleSpec((6,), False)}, {"table": ModuleSpec((1, 2, 6), False)})
        >>> part = Component({"proj": ModuleSpec((4, 6))}, lambda: norms)
        >>> [part.parameter(path) for path in ("proj.bias", "norm.weight", "table", "norm.bias", "proj.weight")]
        [(4,), (6,), (1, 2, 6), None, None]
        """
        if path in self.bare:
            return self.bare[path].shape
        module, _, part = path.rpartition(".")
        if part == "bias":
            owner = self.get(module) or self.norms.get(module)
            return owner.shape[:1] if owner and owner.bias else None
        return self.norms[module].shape if part == "weight" and module in self.norms else None

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
