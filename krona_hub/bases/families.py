"""Named base models: their components, Hub ids and other names, from `families.json`.

A component is a file of `components/`; base models share text encoders. `uncovered` names the adaptable parts of a
pipeline that the catalog does not list. To add a base model, add its entry and run `scripts/build_catalog.py --index`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import NamedTuple


class Family(NamedTuple):
    """A named base model."""

    title: str
    components: Mapping[str, str]  # component -> file of the catalog
    hub_ids: tuple[str, ...] = ()  # the first one is shown
    aliases: tuple[str, ...] = ()  # common alternative names
    uncovered: tuple[str, ...] = ()
    same_layers_as: str | None = None  # the base model that stands for all with the same layers
    variant_of: str | None = None  # the base model with the same layers but for those of the inputs (inpainting)


def _load() -> dict[str, Family]:
    entries = json.loads(files("krona_hub.bases").joinpath("families.json").read_text("utf-8"))
    return {
        name: Family(
            entry["title"],
            entry["components"],
            tuple(entry.get("hub_ids", ())),
            tuple(entry.get("aliases", ())),
            tuple(entry.get("uncovered", ())),
            entry.get("same_layers_as"),
            entry.get("variant_of"),
        )
        for name, entry in entries.items()
    }


FAMILIES: Mapping[str, Family] = _load()
ALIASES: Mapping[str, str] = {alias: name for name, family in FAMILIES.items() for alias in family.aliases}


def equals_of(name: str) -> tuple[str, ...]:
    """The base models with the same layers as this one, itself included; the one that stands for them is first.

    >>> equals_of("skyreels-v2-14b"), equals_of("sdxl")
    (('wan21-t2v-14b', 'skyreels-v2-14b'), ('sdxl',))
    """
    first = FAMILIES[name].same_layers_as or name
    return (first, *(other for other, family in FAMILIES.items() if family.same_layers_as == first))


def related(name: str) -> tuple[str, ...]:
    """The base models with the same layers but perhaps for those of the inputs: equals, variants, and what they vary.

    >>> related("sdxl-inpaint")
    ('sdxl-inpaint', 'sdxl', 'kolors')
    """
    of = FAMILIES[name].variant_of or name
    return tuple(dict.fromkeys((name, *equals_of(of), *(n for n, f in FAMILIES.items() if f.variant_of == of))))
