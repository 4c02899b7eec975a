"""How the layers of an adapter are called in the file to be written. Torch-free.

Names come from the table of the base (`krona_hub.bases.name_table`). Without a base, the names that only put the
canonical path into another dress (diffusers, PEFT, LyCORIS) can still be written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from krona_hub.bases.module_spec import Placement
from krona_hub.errors import InexpressibleError, UnknownBaseError

if TYPE_CHECKING:
    from krona_hub.bases.name_table import NameTable

SPLIT: Mapping[str, str] = {"kohya-ldm": "kohya", "comfyui": "diffusers"}  # the same, with q, k and v apart
PROJECTED = "text_encoder_2"
# a CLIP in second place is one with a projection (SDXL, SD3), in whose class `text_model.` is part of the path


@dataclass(frozen=True)
class Home:
    """The module of a file that a layer goes to."""

    module: str
    placement: Placement
    siblings: tuple[Placement, ...]  # every layer that shares the module, this one included


def homes(
    layers: Iterable[str], dialect: str, table: NameTable | None, *, split_qkv: bool = False
) -> Mapping[str, Home]:
    """Layer -> its place in a file of that dialect.

    Raises UnknownBaseError where the dialect needs a base and there is none.
    """
    layers = tuple(layers)
    if dialect == "lycoris" or table is None:
        return {layer: _alone(_plain_name(layer, dialect), layer) for layer in layers}
    if split_qkv and any(len(ps) > 1 for ps in table.fused(dialect).values()):
        dialect = SPLIT.get(dialect, dialect)
    shared = {p.layer: Home(module, p, ps) for module, ps in table.fused(dialect).items() for p in ps}
    return {layer: shared.get(layer) or _alone(table.spell(layer, dialect), layer) for layer in layers}


def _alone(module: str, layer: str) -> Home:
    place = Placement(layer)
    return Home(module, place, (place,))


def _plain_name(layer: str, dialect: str) -> str:
    """The canonical path in the dress of a dialect that needs no table; no dialect is the native format."""
    component, _, path = layer.partition(".")
    if dialect == "diffusers":
        return f"{component}.{wrapped(component, path)}"
    if dialect == "peft":
        return path
    if not dialect:
        return layer
    if dialect == "lycoris":
        return f"lycoris_{path.replace('.', '_')}"
    raise UnknownBaseError(
        f"the names of this file depend on the base model, and the base of {layer} is not known.",
        fix="Give it with --base, for example --base sd15 or --base sdxl.",
    )


def wrapped(component: str, path: str) -> str:
    """A CLIP path with the `text_model.` that diffusers, kohya and ComfyUI expect.

    >>> wrapped("text_encoder", "encoder.layers.0.mlp.fc1"), wrapped("unet", "conv_in")
    ('text_model.encoder.layers.0.mlp.fc1', 'conv_in')
    """
    clip = component.startswith("text_encoder") and path.startswith("encoder.layers.")
    return f"text_model.{path}" if clip else path


def live_path(layer: str, table: NameTable | None) -> str:
    """The path of a layer's module in the model that current transformers and diffusers build.

    >>> live_path("text_encoder.encoder.layers.0.mlp.fc1", None)
    'encoder.layers.0.mlp.fc1'
    >>> live_path("text_encoder_2.encoder.layers.0.mlp.fc1", None)
    'text_model.encoder.layers.0.mlp.fc1'
    """
    if table is not None:
        return table.spell(layer, "peft")
    component, _, path = layer.partition(".")
    return wrapped(component, path) if component == PROJECTED else path


def check_one_component(components: Iterable[str], dialect: str) -> None:
    """LyCORIS wraps one model per file: InexpressibleError for two."""
    names = tuple(components)
    if dialect == "lycoris" and len(names) > 1:
        raise InexpressibleError(
            f"a lycoris_ file is for one model, but the adapter has {', '.join(names)}.",
            fix="Write --to lycoris-lokr, whose names tell them apart.",
        )
