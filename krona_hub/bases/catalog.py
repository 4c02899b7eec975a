"""The catalog of known base models: names, shapes and the sources of their configurations. Torch-free.

`scripts/build_catalog.py` writes `components/<component>.json` from published configurations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache, lru_cache, partial
from importlib.resources import files
from typing import Any, NamedTuple

from krona_hub.bases.base import Base
from krona_hub.bases.component import Component
from krona_hub.bases.families import ALIASES, FAMILIES
from krona_hub.bases.module_spec import OtherParameters
from krona_hub.bases.name_patterns import expand
from krona_hub.errors import SPECIFY_BASE, UnknownBaseError

CONFIG_STATUS: Mapping[str, str] = {  # source of the configuration
    "F": "stored copy of the published config.json",
    "C": "conversion script of diffusers",
    "P2": "two public sources agree",
    "P1": "one public source",
    "R": "recalled, not checked",
    "D": "defaults of the class",
    "L": "a list of modules; diffusers has no class of this model",
    "O": "our own: scripts/make_tiny_base.py",
}
TOTAL_STATUS: Mapping[str, str] = {  # source of the total number of parameters
    "W": "a public source states the same number for the model",
    "H": "the key hash of a released file proves names and shapes",
    "A": "a public source computes the same number",
    "P": "agrees with the published size in billions",
    "N": "no source found",
    "O": "our own: counted in the model",
}


class CatalogEntry(NamedTuple):
    """One file of the catalog: a single model of a pipeline."""

    name: str  # e.g. "sdxl.unet"
    library: str  # diffusers or transformers; "" for a list of modules
    class_name: str
    config_status: str  # a key of CONFIG_STATUS
    total_status: str  # a key of TOTAL_STATUS
    total_parameters: int  # of the whole model, including embeddings and norms, without buffers
    source: str
    config: Mapping[str, Any]
    modules: Component


def names() -> tuple[str, ...]:
    """The names of all base models in the catalog."""
    return tuple(FAMILIES)


@cache
def get(name: str) -> Base:
    """Look up a base model by name, alias or Hub id. Raises UnknownBaseError, with a suggestion, for unknown names.

    >>> get("sdxl").components["unet"]["mid_block.attentions.0.proj_in"].shape
    (1280, 1280)
    >>> get("stabilityai/stable-diffusion-xl-base-1.0").name
    'sdxl'
    """
    family = find(name)
    if family is None:
        near = get_close_matches(name.lower(), [*FAMILIES, *ALIASES], n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UnknownBaseError(
            f"Unknown base model {name!r}.",
            fix=f"{hint}{SPECIFY_BASE}",
        )
    entry = FAMILIES[family]
    parts = {c: component(file).modules for c, file in entry.components.items()}
    return Base(family, family, parts, next(iter(entry.hub_ids), None), entry.uncovered)


def find(name: str) -> str | None:
    """Resolve a name, alias or Hub id to a catalog name; None if unknown.

    >>> find("Flux"), find("stabilityai/stable-diffusion-2-1"), find("nobody/nothing")
    ('flux1-dev', 'sd21', None)
    """
    wanted = name.lower()
    if wanted in FAMILIES:
        return wanted
    return ALIASES.get(wanted) or _hub_ids().get(wanted)


@lru_cache(maxsize=1)
def _hub_ids() -> Mapping[str, str]:
    return {hub_id.lower(): name for name, family in FAMILIES.items() for hub_id in family.hub_ids}


@cache
def component(name: str) -> CatalogEntry:
    """Load one file of the catalog, with all patterns expanded."""
    data = json.loads(files("krona_hub.bases").joinpath("components", f"{name}.json").read_text("utf-8"))
    return CatalogEntry(
        name=data["component"],
        library=data["library"],
        class_name=data["class"],
        config_status=data["config_status"],
        total_status=data["total_status"],
        total_parameters=data["total_parameters"],
        source=data["source"],
        config=data["config"],
        modules=Component(expand(data["modules"]), partial(_other_parameters, data)),
    )


def _other_parameters(data: Mapping[str, Any]) -> OtherParameters:
    return OtherParameters(expand(data.get("norms", {})), expand(data.get("parameters", {})))


def component_names() -> tuple[str, ...]:
    """The names of all catalog files, sorted."""
    folder = files("krona_hub.bases").joinpath("components")
    return tuple(sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")))
