"""Names of layers whose base model is unknown: the module names of their file, in a component of their own. Torch-free.

Canonical names need the table of a base model. Without one, a file keeps its names, so that every format whose keys are
module names can be written from it, and a round trip through the native format gives the same keys.
"""

from __future__ import annotations

UNKNOWN = "unknown"
"""The pseudo component of layers whose base model is unknown; the rest of the name is the module name of the file."""

KEPT_NAMES = (
    "no known base model has these modules: the names of the file are kept; whether an application knows them is not "
    "known"
)
"""The note on every file that is read or written without a base model."""


def unknown_layer(module: str) -> str:
    """Return the canonical name of a module whose base model is unknown.

    >>> unknown_layer("lora_unet_fancy_blocks_0_q"), module_name("unknown.fancy.0.q"), module_name("unet.conv_in")
    ('unknown.lora_unet_fancy_blocks_0_q', 'fancy.0.q', None)
    """
    return f"{UNKNOWN}.{module}"


def module_name(layer: str) -> str | None:
    """Return the module name that a layer of an unknown base model has in files; None for any other layer."""
    component, _, module = layer.partition(".")
    return module if component == UNKNOWN else None
