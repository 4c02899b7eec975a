"""Check the DoRA of layers that several modules of a file adapt together, such as up_proj and gate_proj. Torch-free."""

from __future__ import annotations

from collections.abc import Container, Mapping

from krona_hub.bases.module_spec import Placement
from krona_hub.errors import KronaError, UnsupportedError
from krona_hub.formats.parsing.base_match import BaseMatch
from krona_hub.formats.parsing.module_layout import ModuleLayout


def undefined_doras(
    match: BaseMatch, layouts: Mapping[str, ModuleLayout], unread: Container[str]
) -> dict[str, KronaError]:
    """Errors of modules that are a part of a layer whose other rows have no magnitude, or one per input.

    A layer has either no magnitude or one for each row, so that a DoRA of some of its rows is not a DoRA of the layer.
    `unread` are the modules that cannot be read for other reasons.
    """
    found: dict[str, KronaError] = {}
    for layer, modules in _modules_by_layer(match, unread).items():
        axes = {name: layouts[name].dora for name in modules}
        if not any(axes.values()):
            continue
        module = match.base.module(layer) if match.base else None
        rows = sum(place.height(module) for place in modules.values()) if module else 0
        if {*axes.values()} == {"out"} and module and rows == module.shape[0]:
            continue
        for name in modules:
            found[name] = UnsupportedError(
                f"The module is a part of {layer}, and the file does not have a magnitude for each row of that layer.",
                fix="Merge the DoRA into its base model with the application that trained it.",
            )
    return found


def _modules_by_layer(match: BaseMatch, unread: Container[str]) -> dict[str, dict[str, Placement]]:
    """Layer -> the modules that are a part of it; no layer that a single module adapts entirely."""
    found: dict[str, dict[str, Placement]] = {}
    for name, places in match.places.items():
        for place in places:
            if place.part and name not in unread:
                found.setdefault(place.layer, {})[name] = place
    return found
