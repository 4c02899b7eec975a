"""Which entry of an application's table covers a base model. Torch-free."""

from __future__ import annotations

from functools import cache

from krona_hub.bases import catalog
from krona_hub.bases.base import Base
from krona_hub.bases.families import FAMILIES, equals_of
from krona_hub.bases.ldm_names import is_sdxl_like, is_unet
from krona_hub.formats.compatibility.applications import Application, FamilySupport


def support_of(application: Application, base: Base) -> FamilySupport | None:
    """The entry for a base model of the catalog, or for one with the same layers; None if there is none.

    A base model outside the catalog, such as a checkpoint of another size, has the names of its architecture: those
    of a U-Net follow a rule, those of a transformer a table.
    """
    if base.family is not None and base.family in FAMILIES:
        return next((application.by_base[n] for n in equals_of(base.family) if n in application.by_base), None)
    if base.denoiser is None:
        return None
    modules = base.components[base.denoiser]
    if is_unet(modules):
        return application.by_base.get("sdxl" if is_sdxl_like(modules) else "sd15")
    if modules.original is None:
        return None
    known = (family for family in application.families if modules.original.name in _architectures(family.bases))
    return next(known, None)


@cache
def _architectures(bases: tuple[str, ...]) -> frozenset[str]:
    """The names of the architectures of base models of the catalog."""
    found = set()
    for name in bases:
        base = catalog.get(name)
        original = base.components[base.denoiser].original if base.denoiser else None
        if original is not None:
            found.add(original.name)
    return frozenset(found)
