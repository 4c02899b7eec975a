"""Checkpoints of models that the catalog does not list: the names of the file, without a common wrapper. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from krona_hub.bases import ldm_names
from krona_hub.bases.component import Component
from krona_hub.bases.weight_files import StoredTensor

LDM = "model.diffusion_model."  # beside it, such a checkpoint may contain a VAE and text encoders
WRAPPERS = (LDM, "diffusion_model.", "net.", "model.", "transformer.", "unet.")
ADAPTER_KEYS = re.compile(r"[._]lora[._](up|down|A|B)\b|\.(lokr|hada)_w[12]|\.kron_[ab]\b|\.kron_[ab]_")
UNET_BLOCKS = ("down_blocks.", "up_blocks.", "input_blocks.", "output_blocks.")


def unwrapped(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors of the denoiser by their names without the wrapper that all of them share.

    >>> from pathlib import Path
    >>> place = StoredTensor(Path("x"), "net.a.weight", (2, 3))
    >>> list(unwrapped({"net.a.weight": place, "net.b.weight": place}))
    ['a.weight', 'b.weight']
    """
    own = {name: tensor for name, tensor in stored.items() if name.startswith(LDM)} or dict(stored)
    wrapper = next((text for text in WRAPPERS if all(name.startswith(text) for name in own)), "")
    return {name.removeprefix(wrapper): tensor for name, tensor in own.items()}


def is_adapter(names: Iterable[str]) -> bool:
    """Return whether the tensors are those of an adapter.

    >>> is_adapter(["a.to_q.lora_down.weight"]), is_adapter(["a.to_q.weight", "a.lora_proj.weight"])
    (True, False)
    """
    return any(ADAPTER_KEYS.search(name) for name in names)


def component_by_content(modules: Component) -> str:
    """Return the component that the modules look like; a transformer unless they show another."""
    if ldm_names.is_unet(modules) or sum(any(m.startswith(b) for m in modules) for b in UNET_BLOCKS) > 1:
        return "unet"
    return "text_encoder" if modules.kind else "transformer"
