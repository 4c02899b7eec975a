"""While adapters are attached, diffusers may not rebuild the projections that they are around."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from torch import nn

from krona_hub.errors import ConflictError

REBUILDING = ("fuse_qkv_projections", "unfuse_qkv_projections")  # methods that copy, or go back to, base weights alone


def refuse(*_: Any, **__: Any) -> NoReturn:
    """Stands in for those methods: after them a model would compute without its adapters, and say nothing."""
    raise ConflictError(
        "adapters are attached to the projections that this call would replace.",
        fix="Detach (or unload) them first, and load them again afterwards: fused projections are adapted too.",
    )


def guard(models: Iterable[nn.Module]) -> None:
    """Put the refusal before the class's methods, on these models alone."""
    for model in models:
        vars(model).update({name: refuse for name in REBUILDING if hasattr(type(model), name)})


def release(models: Iterable[nn.Module]) -> None:
    """The class's methods again."""
    for model in models:
        for name in REBUILDING:
            if vars(model).get(name) is refuse:
                del vars(model)[name]
