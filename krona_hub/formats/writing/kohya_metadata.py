"""The metadata that kohya's scripts write into adapter files and read from them. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from krona_hub.formats.known.registry import storage_of

KEPT = ("ss_", "modelspec.")  # prefixes kept from the source file
STALE = (
    "ss_network_",
    "ss_lowram",
    "modelspec.hash_sha256",
    "modelspec.encoder_layer",
)  # dropped prefixes
BASES: Mapping[str, tuple[str, str]] = {  # catalog name -> ss_base_model_version, modelspec.architecture
    "sd15": ("sd_v1", "stable-diffusion-v1"),
    "sd21-base": ("sd_v2", "stable-diffusion-v2-512"),
    "sd21": ("sd_v2_v", "stable-diffusion-v2-768-v"),
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
    "sd3-medium": ("sd3m", "stable-diffusion-3-medium"),
    "sd35-medium": ("sd3.5-medium", "stable-diffusion-3.5-medium"),
    "sd35-large": ("sd3.5-large", "stable-diffusion-3.5-large"),
    "flux1-dev": ("flux1", "flux-1-dev"),
    "flux1-schnell": ("flux1", "flux-1-schnell"),
    "lumina2": ("lumina2", "lumina-2"),
}


def kohya_metadata(
    format_name: str,
    ranks: Sequence[int],
    family: str | None,
    source: Mapping[str, str],
    trigger_words: Sequence[str] = (),
) -> dict[str, str]:
    """`ss_*` and `modelspec.*` metadata of a file whose modules have these ranks and alphas.

    Training metadata of the source file are kept; its hashes (`sshs_*`) no longer apply and are dropped.

    >>> kohya_metadata("kohya-lora", [4, 4], "sdxl", {"ss_epoch": "3", "sshs_model_hash": "0"})["ss_network_dim"]
    '4'
    """
    storage = storage_of(format_name)
    kept = {k: v for k, v in source.items() if k.startswith(KEPT) and not k.startswith(STALE)}
    dim = str(ranks[0]) if len(set(ranks)) == 1 else "Dynamic"  # as written by sd-scripts' resize script
    written = {
        "format": "pt",
        "ss_network_module": storage.network_module,
        "ss_network_dim": dim,
        "ss_network_alpha": f"{float(dim)}" if dim != "Dynamic" else dim,
    }
    if storage.algorithm:
        written["ss_network_args"] = json.dumps({"algo": storage.algorithm})
    if family is not None and family in BASES:
        version, architecture = BASES[family]
        written |= {"ss_base_model_version": version, "modelspec.architecture": f"{architecture}/lora"}
        if version.startswith("sd_v"):
            written["ss_v2"] = str(version.startswith("sd_v2"))
    if trigger_words:
        written["modelspec.trigger_phrase"] = ", ".join(trigger_words)
    return kept | written
