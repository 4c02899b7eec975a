"""Every base model of the catalog as parameters of a test: one of each architecture is quick, the others are slow."""

import pytest

from krona_hub.bases import catalog


def _architecture(name: str) -> str:
    base = catalog.get(name)
    original = base.components[base.denoiser].original
    return original.name if original else name.partition("-")[0]


def every_base() -> list:
    """The names of all base models; those whose architecture another one has, too, are marked slow."""
    seen, found = set(), []
    for name in catalog.names():
        architecture = _architecture(name)
        found.append(pytest.param(name, marks=[pytest.mark.slow] if architecture in seen else []))
        seen.add(architecture)
    return found
