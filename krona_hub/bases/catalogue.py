"""The catalogue of known bases: names, shapes and what is known about their configuration. Torch-free.

`catalogue/<component>.json` is written by `scripts/build_catalogue.py` from published configurations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any, NamedTuple

from krona_hub.bases.base import Base
from krona_hub.bases.component import Component
from krona_hub.bases.families import ALIASES, FAMILIES
from krona_hub.bases.name_patterns import expand
from krona_hub.errors import UnknownBaseError

CONFIG_STATUS: Mapping[str, str] = {  # how far the configuration is checked
    "F": "stored copy of the published config.json",
    "C": "conversion script of diffusers",
    "P2": "two public sources agree",
    "P1": "one public source",
    "R": "recalled, not checked",
    "D": "defaults of the class",
    "O": "our own: scripts/make_tiny_base.py",
}
TOTAL_STATUS: Mapping[str, str] = {  # how far the total number of parameters is checked
    "W": "the same number stands beside the named model in a public source",
    "A": "a public source computes the same number",
    "N": "no source found",
    "O": "our own: counted in the model",
}


class CatalogueEntry(NamedTuple):
    """A file of the catalogue: one model of a pipeline."""

    name: str  # such as "sdxl.unet"
    library: str  # diffusers or transformers
    class_name: str
    config_status: str  # a key of CONFIG_STATUS
    total_status: str  # a key of TOTAL_STATUS
    total_parameters: int  # of the whole model, embeddings and norms included; no buffers
    source: str
    config: Mapping[str, Any]
    modules: Component


def names() -> tuple[str, ...]:
    """The bases of the catalogue."""
    return tuple(FAMILIES)


@cache
def get(name: str) -> Base:
    """A base by its name, by another spelling of it, or by its Hub id. Raises UnknownBaseError with the nearest name.

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
            f"no base is called {name!r}.",
            fix=f"{hint}Give a folder, a checkpoint file, or one of {', '.join(FAMILIES)}.",
        )
    entry = FAMILIES[family]
    parts = {c: component(file).modules for c, file in entry.components.items()}
    return Base(family, family, parts, next(iter(entry.hub_ids), None), entry.uncovered)


def find(name: str) -> str | None:
    """The catalogue name behind a name, another spelling or a Hub id; None where it is unknown.

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
def component(name: str) -> CatalogueEntry:
    """One file of the catalogue, expanded."""
    data = json.loads(files("krona_hub.bases").joinpath("catalogue", f"{name}.json").read_text("utf-8"))
    return CatalogueEntry(
        name=data["component"],
        library=data["library"],
        class_name=data["class"],
        config_status=data["config_status"],
        total_status=data["total_status"],
        total_parameters=data["total_parameters"],
        source=data["source"],
        config=data["config"],
        modules=Component(expand(data["modules"])),
    )


def component_names() -> tuple[str, ...]:
    """Every file of the catalogue, sorted."""
    folder = files("krona_hub.bases").joinpath("catalogue")
    return tuple(sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")))
