"""Dialects of module names: a prefix for the component, a path, and dots or underscores.

| dialect | example (SDXL, then FLUX.1) | used by |
|---|---|---|
| diffusers | `unet.down_blocks.1…to_q`, `transformer.transformer_blocks.0.attn.to_q` | diffusers pipelines |
| peft | `down_blocks.1…to_q`: no component, `text_model.` as in the current class | PEFT folders |
| kohya | `lora_unet_down_blocks_1_…`, `lora_te1_text_model_…` | LyCORIS, ComfyUI, Forge, A1111 |
| kohya-ldm | `lora_unet_input_blocks_4_1_…`, `lora_unet_double_blocks_0_img_attn_qkv` | sd-scripts |
| original | `diffusion_model.input_blocks.4.1.…` | ai-toolkit, BFL |
| processor | `unet.….attn1.processor.to_q_lora` | diffusers up to 0.21, DiffuseKronA |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from krona_hub.bases import ldm_names
from krona_hub.bases.base import CONDITIONER, DENOISERS, Base
from krona_hub.bases.original_names import AUTHORS
from krona_hub.errors import UsageError


class Dialect(NamedTuple):
    """Prefixes and separators of a dialect."""

    denoiser: str  # prefix; {} is the component
    text: str  # prefix of text encoders; {} is the component, {n} its number in trainers
    underscored: bool = False
    originals: bool = False  # whether the denoiser has its original names


DIALECTS: Mapping[str, Dialect] = {
    "diffusers": Dialect("{}.", "{}."),
    "peft": Dialect("", ""),
    "kohya": Dialect("lora_unet_", "lora_te{n}_", underscored=True),
    "kohya-ldm": Dialect("lora_unet_", "lora_te{n}_", underscored=True, originals=True),
    "original": Dialect("diffusion_model.", "{}.", originals=True),
    "processor": Dialect("{}.", "{}."),
}
PROCESSOR = (  # the only modules with attention-processor names
    (re.compile(r"(.*attn\d?)\.(to_[qkv]|add_[qkv]_proj|to_add_out)"), r"\1.processor.\2_lora"),
    (re.compile(r"(.*attn\d?)\.to_out\.0"), r"\1.processor.to_out_lora"),
    (re.compile(r"(.*self_attn)\.(q|k|v|out)_proj"), r"\1.to_\2_lora"),
)


def prefixed(base: Base, component: str, path: str, dialect: str) -> str:
    """The name of a module path in a dialect: prefix, `text_model.` of CLIP, underscores."""
    rule = _rule(base, component, dialect)
    path = text_model(base, component, path, dialect)
    if component == CONDITIONER and rule.denoiser != "{}.":  # the part of the transformer with this name elsewhere
        path = f"llm_adapter.{path}" if rule.denoiser else path
    prefix = rule.denoiser if component in (*DENOISERS, CONDITIONER) else rule.text
    flat = rule.underscored or prefix.startswith("lora_")
    if flat and component.startswith("text_encoder"):  # ComfyUI knows lora_te_layers_…, but not lora_te_model_layers_…
        path = path.removeprefix("model.")
    path = path.replace(".", "_") if flat else path
    return prefix.format(component, n=trainers_number(base, component)) + path


def spelling_of(base: Base, component: str, dialect: str) -> str | None:
    """The spelling of the names of a component in a dialect (see `original_names`); None for the diffusers names."""
    if component not in DENOISERS or not _rule(base, component, dialect).originals:
        return None
    modules = base.components[component]
    if ldm_names.is_unet(modules):  # sd-scripts uses ldm names for SDXL, but diffusers names for SD 1 and 2
        return AUTHORS if dialect != "kohya-ldm" or ldm_names.is_sdxl_like(modules) else None
    original = modules.original
    return AUTHORS if original and original.in_files and AUTHORS in original.spellings else None


def text_model(base: Base, component: str, path: str, dialect: str) -> str:
    """Add `text_model.` to CLIP paths, which several applications require (FORMATS §12.3).

    PEFT loads into an instantiated model, where only the class with a projection still has it.
    """
    modules = base.components[component]
    inside = path != "text_projection" and modules.kind == "clip"
    if component in DENOISERS or not inside or (dialect == "peft" and "text_projection" not in modules):
        return path
    return f"text_model.{path}"


def trainers_number(base: Base, component: str) -> str:
    """The number after `lora_te` of a text encoder.

    None for a single encoder (1 for T5, as in ComfyUI), and 3 for T5 among others (also in FLUX, where it is second).
    """
    is_t5 = base.components[component].kind == "t5"
    if component in DENOISERS or len(base.text_encoders) == 1:
        return "1" if is_t5 else ""
    if is_t5:
        return "3"
    return component.removeprefix("text_encoder").removeprefix("_") or "1"


def _rule(base: Base, component: str, dialect: str) -> Dialect:
    if dialect not in DIALECTS:
        raise UsageError(f"Unknown dialect {dialect!r} of module names.", fix=f"Choose one of {', '.join(DIALECTS)}.")
    return DIALECTS[dialect]


def processor_name(component: str, path: str) -> str | None:
    """The attention-processor name of a module; None if it has none."""
    for pattern, old in PROCESSOR:
        if pattern.fullmatch(path):
            return f"{component}.{pattern.sub(old, path)}"
    return None
