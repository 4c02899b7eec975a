"""The `modelspec.*` metadata keys that describe a native file to other applications. Torch-free.

ModelSpec 1.0.0: https://github.com/Stability-AI/ModelSpec. Date and hash are omitted:
equal input gives equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

from krona_hub.adapters.provenance import BaseModel, Provenance
from krona_hub.errors import one_of

PREFIX = "modelspec."
TITLE, UNTITLED = f"{PREFIX}title", "Krona adapter for "  # UNTITLED: start of generated titles
ARCHITECTURES = {  # catalog name -> architecture id; other families keep their name
    "sd15": "stable-diffusion-v1",
    "sd21-base": "stable-diffusion-v2-512",
    "sd21": "stable-diffusion-v2-768-v",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
    "sd3-medium": "stable-diffusion-3-medium",
    "sd35-medium": "stable-diffusion-3.5-medium",
    "sd35-large": "stable-diffusion-3.5-large",
    "flux1-dev": "flux-1-dev",
    "flux1-schnell": "flux-1-schnell",
}
ADAPTER = "krona"  # the tensor names differ from those of a LoRA, so the architecture must differ, too
_ABOUT_BYTES = (f"{PREFIX}hash_", f"{PREFIX}date")  # valid only for the file that they were read from


def keys(base: BaseModel | None, provenance: Provenance) -> dict[str, str]:
    """Return the keys for a file: those of its source that are still valid, the required ones, and those known.

    >>> keys(BaseModel(family="sdxl"), Provenance())["modelspec.architecture"]
    'stable-diffusion-xl-v1-base/krona'
    """
    family = base.family if base and base.is_certain else None  # one of several is not named
    kept = {k: v for k, v in provenance.metadata.items() if k.startswith(PREFIX) and not k.startswith(_ABOUT_BYTES)}
    known = {
        "sai_model_spec": "1.0.0",
        "architecture": _architecture(family, kept),
        "implementation": "krona-hub",
        "title": kept.get(TITLE) or f"{UNTITLED}{_title(base)}",
        "license": provenance.licence or "",
        "trigger_phrase": ", ".join(provenance.trigger_words),
    }
    return kept | {PREFIX + key: value for key, value in known.items() if value}


def _title(base: BaseModel | None) -> str:
    return one_of(base.names) if base and base.names else "an unknown base"


def added(metadata: Mapping[str, str], base: BaseModel | None, provenance: Provenance) -> dict[str, str]:
    """Return the metadata keys that were added or edited after the file was written."""
    ours = {"format": "pt"} | keys(base, provenance)
    return {k: v for k, v in metadata.items() if not k.startswith("krona.") and ours.get(k) != v}


def _architecture(family: str | None, kept: Mapping[str, str]) -> str:
    source = kept.get(f"{PREFIX}architecture", "unknown").partition("/")[0]
    return f"{ARCHITECTURES.get(family, family) if family else source}/{ADAPTER}"
