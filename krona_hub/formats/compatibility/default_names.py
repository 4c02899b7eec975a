"""Names of the modules of a transformer in a file for no particular application: those that most of them find.

Torch-free. U-Nets keep the names of their format, which every application finds.
"""

from __future__ import annotations

from collections.abc import Sequence

from krona_hub.bases.base import Base
from krona_hub.bases.ldm_names import is_unet
from krona_hub.formats.compatibility.applications import APPLICATIONS
from krona_hub.formats.compatibility.base_support import support_of
from krona_hub.formats.compatibility.naming import ComponentNamings, Names, Naming, Speller, naming

FALLBACKS = {"lora": ("lora_unet_ authors", "lora_transformer_ diffusers"), "lokr": ("lycoris_ diffusers",)}


def default_names(base: Base, format_name: str, kind: str, layers: Sequence[str]) -> Names | None:
    """The names of the denoiser's layers, the most widely found first; None for a U-Net.

    A LoKr of q, k and v has no exact form in a fused module: names of separate modules come first for it, if any
    application finds them.

    >>> from krona_hub.bases import catalog
    >>> layer = "transformer.transformer_blocks.0.attn.to_q"
    >>> names = default_names(catalog.get("flux1-dev"), "lycoris-lokr", "lokr", [layer])
    >>> str(next(names.usable(layer)))
    'transformer. diffusers'
    """
    denoiser = base.denoiser
    if denoiser is None or is_unet(base.components[denoiser]):
        return None
    paths = [layer.partition(".")[2] for layer in layers if layer.partition(".")[0] == denoiser]
    speller = Speller(base, denoiser)
    votes = _votes(base, format_name, kind, paths, speller)
    if not votes and base.family is None:  # no application has names for it: those of its own layers
        return None
    ranked = sorted(votes, key=lambda n: (kind == "lokr" and _is_fused(speller, n, denoiser, paths), -votes[n]))
    chosen = [n for n in ranked if votes[n]] + [n for n in map(naming, FALLBACKS[kind]) if speller.exists(n)]
    namings = ComponentNamings(dict.fromkeys(map(str, chosen)), {})
    return Names(base, {"denoiser": namings})


def _votes(base: Base, format_name: str, kind: str, paths: Sequence[str], speller: Speller) -> dict[Naming, int]:
    """Naming -> number of applications that find all these layers in it."""
    votes: dict[Naming, int] = {}
    for application in APPLICATIONS.values():
        support = support_of(application, base)
        known = support.names_for(format_name).get("denoiser") if support else None
        if support is None or known is None or not support.loads("lora" if kind == "lora" else "lokr"):
            continue
        if application.rejection(format_name) is not None or format_name in support.rejected:
            continue
        for n in known.namings:
            if speller.exists(n) and all(speller.has(n, f"{speller.component}.{path}") for path in paths):
                same = Naming(n.prefix, speller.spelling(n) or ("diffusers" if n.spelling == "own" else n.spelling))
                votes[same] = votes.get(same, 0) + (not any(known.lacks(n, path) for path in paths))
    return votes


def _is_fused(speller: Speller, known: Naming, denoiser: str, paths: Sequence[str]) -> bool:
    return any(len(places) > 1 for path in paths for _, _, places in speller.homes(known, f"{denoiser}.{path}"))
