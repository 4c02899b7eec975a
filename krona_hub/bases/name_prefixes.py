"""Prefixes of module names in files, and the components they denote.

A role is resolved against a base model: `te2` of trainers is CLIP-G in SDXL and T5 in FLUX.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from krona_hub.bases.base import COMPONENTS, CONDITIONER, DENOISERS, Base

ROLES: Mapping[str, tuple[tuple[str, str], ...]] = {  # role -> (component, kind or ""), in order of preference
    "denoiser": tuple((name, "") for name in DENOISERS),
    CONDITIONER: ((CONDITIONER, ""),),
    "unet": (("unet", ""),),
    "prior": (("prior", ""),),
    "decoder": (("decoder", ""),),
    "transformer": (("transformer", ""),),
    "text_encoder": (("text_encoder", ""),),
    "text_encoder_2": (("text_encoder_2", ""),),
    "text_encoder_3": (("text_encoder_3", ""),),
    "text_encoder_4": (("text_encoder_4", ""),),
    "te1": (("text_encoder", ""), ("text_encoder_2", "clip")),  # the SDXL refiner has CLIP-G only
    "te2": (("text_encoder_2", ""),),
    "te3": (("text_encoder_3", ""), ("text_encoder_2", "t5"), ("text_encoder", "t5")),  # FLUX trainers call T5 te3
    "te4": (("text_encoder_4", ""),),
    "clip_l": (("text_encoder", "clip"),),
    "clip_g": (("text_encoder_2", "clip"),),
    "t5": (("text_encoder_3", "t5"), ("text_encoder_2", "t5"), ("text_encoder", "t5")),
    "language model": (("text_encoder_4", "language model"), ("text_encoder", "language model")),
    "text encoder": tuple((name, "") for name in COMPONENTS if name.startswith("text_encoder")),
}
WORDS: Mapping[str, str] = {  # role -> name of the component, for errors
    "denoiser": "U-Net or transformer", "unet": "U-Net", "transformer": "transformer",
    "text_encoder": "text encoder", "text_encoder_2": "second text encoder", "text_encoder_3": "third text encoder",
    "text_encoder_4": "fourth text encoder", "te1": "text encoder", "te2": "second text encoder",
    "te3": "third text encoder", "te4": "fourth text encoder",
    "clip_l": "CLIP-L text encoder", "clip_g": "CLIP-G text encoder", "t5": "T5 text encoder",
    "language model": "language model", "text encoder": "text encoder", CONDITIONER: "llm_adapter",
    "prior": "prior (stage C)", "decoder": "decoder (stage B)",
}  # fmt: skip
ANY = "any"  # the name does not state a component
OPENCLIP = "openclip."  # its `text_projection` is transposed, unlike that of CLIP


COMFYUI_TEXT: Mapping[str, str] = {  # ComfyUI's name of a text encoder -> role, where the name alone says it
    **dict.fromkeys(("umt5xxl", "pile_t5xl", "mt5xl", "byt5_small"), "t5"),
    **dict.fromkeys(("qwen3_06b", "qwen3_2b", "qwen3_4b", "qwen3_8b", "qwen3vl_4b", "qwen25_3b"), "language model"),
    **dict.fromkeys(("qwen25_7b", "gemma2_2b", "gemma3_12b", "llama", "mistral3_24b"), "language model"),
    **dict.fromkeys(("ministral3_3b",), "language model"),
}


class Prefix(NamedTuple):
    """A prefix of module names and its role."""

    text: str
    role: str  # a key of ROLES, or ANY
    replacement: str = ""  # prefix in the table of original names


UNDERSCORED = (  # longer prefixes before their own prefixes
    Prefix("lora_unet_llm_adapter_", CONDITIONER),
    Prefix("lora_unet_model_", "denoiser"),  # HiDream-O1 in musubi-tuner
    Prefix("lora_unet_", "denoiser"),
    Prefix("lora_prior_unet_", "prior"),  # OneTrainer
    Prefix("lora_prior_te_", "te1"),
    Prefix("Hunyuan_video_I2V_lora_", "transformer"),  # the trainers of HunyuanVideo
    Prefix("Hunyuan_video_lora_", "transformer"),
    Prefix("lora_transformer_", "transformer"),
    Prefix("lora_te1_", "te1"),
    Prefix("lora_te2_", "te2"),
    Prefix("lora_te3_", "te3"),
    Prefix("lora_te4_", "te4"),
    Prefix("lora_te_", "te1"),
    Prefix("lycoris_transformer_", "transformer"),
    Prefix("lycoris_unet_", "unet"),
    Prefix("lycoris_text_encoder_2_", "text_encoder_2"),
    Prefix("lycoris_text_encoder_", "text_encoder"),
    Prefix("lycoris_", ANY),
)
DOTTED = (
    *(Prefix(text.format(c), c) for c in COMPONENTS
      for text in ("base_model.model.{}.", "{}.base_model.model.", "{}.")),
    Prefix("unet.base_model.model.", "denoiser"),  # also of PixArt, which has no U-Net
    Prefix("base_model.model.", ANY),
    Prefix("diffusion_model.llm_adapter.", CONDITIONER),
    Prefix("transformer.llm_adapter.", CONDITIONER),
    Prefix("model.diffusion_model.llm_adapter.", CONDITIONER),
    Prefix("net.llm_adapter.", CONDITIONER),
    Prefix("llm_adapter.", CONDITIONER),
    Prefix("diffusion_model.", "denoiser"),
    Prefix("model.diffusion_model.", "denoiser"),
    Prefix("net.", "denoiser"),  # checkpoints of NVIDIA
    Prefix("text_encoders.clip_l.transformer.", "clip_l"),
    Prefix("text_encoders.clip_h.transformer.", "clip_l"),
    Prefix("text_encoders.clip_g.transformer.", "clip_g"),
    Prefix("text_encoders.t5xxl.transformer.", "t5"),
    Prefix("text_encoders.clip_l.", "clip_l"),
    Prefix("text_encoders.clip_g.", "clip_g"),
    Prefix("text_encoders.t5xxl.", "t5"),
    Prefix("text_encoders.hydit_clip.transformer.bert.", "te1"),
    Prefix("text_encoders.transformer.bert.", "te1"),
    Prefix("text_encoders.transformer.", "text encoder"),
    *(Prefix(f"text_encoders.{name}.transformer.", role) for name, role in COMFYUI_TEXT.items()),
    Prefix("cond_stage_model.transformer.", "te1"),
    Prefix("cond_stage_model.model.", "te1", OPENCLIP),
    Prefix("conditioner.embedders.0.transformer.", "text_encoder"),
    Prefix("conditioner.embedders.0.model.", "te2", OPENCLIP),
    Prefix("conditioner.embedders.1.model.", "te2", OPENCLIP),
)  # fmt: skip


_BY_HEAD: Mapping[str, list[Prefix]] = {  # index by first segment, for speed
    head: [p for p in known if p.text.startswith(head)]
    for known, split in ((UNDERSCORED, "_"), (DOTTED, "."))
    for head in {p.text.partition(split)[0] + split for p in known}
}


def readings(name: str) -> list[tuple[str, str]]:
    """(role, rest of the name) for every matching prefix, longest first; (ANY, name) if none matches.

    A doubled prefix, which exporters write by mistake, counts as one.

    >>> readings("lycoris_transformer_blocks_0_ff")
    [('transformer', 'blocks_0_ff'), ('any', 'transformer_blocks_0_ff')]
    >>> readings("encoder.layers.0.mlp.fc1")
    [('any', 'encoder.layers.0.mlp.fc1')]
    >>> readings("transformer.transformer.proj_out")
    [('transformer', 'transformer.proj_out'), ('transformer', 'proj_out')]
    """
    known = _matching(name)
    found = [(p.role, p.replacement + name[len(p.text) :]) for p in known]
    for prefix in known:
        rest = name[len(prefix.text) :]
        found += [
            (prefix.role if inner.role == ANY else inner.role, inner.replacement + rest[len(inner.text) :])
            for inner in _matching(rest)
            if prefix.role in (inner.role, ANY, "denoiser") or inner.role in (ANY, "denoiser")
        ]
    return list(dict.fromkeys(found)) or [(ANY, name)]


def _matching(name: str) -> list[Prefix]:
    split = "." if "." in name else "_"
    return [p for p in _BY_HEAD.get(name.partition(split)[0] + split, ()) if name.startswith(p.text)]


def components(role: str, base: Base) -> tuple[str, ...]:
    """The components of `base` that a role can denote: all for ANY, else the first of its list that exists.

    `text encoder` denotes each of them.
    """
    if role == ANY:
        return tuple(base.components)
    if role == "text encoder":
        return base.text_encoders
    found = [c for c, kind in ROLES[role] if c in base.components and kind in ("", _kind(base, c))]
    is_shared = role == "te1" and found and _kind(base, found[0]) == "language model"  # te1 is the CLIP of HunyuanVideo
    return tuple(found if is_shared else found[:1])


def _kind(base: Base, component: str) -> str:
    return base.components[component].kind or "language model"


def lacking(name: str, base: Base) -> str:
    """The component that `base` lacks for a module of this name, in words; "" if it lacks none.

    >>> lacking("lora_te2_text_model_encoder_layers_0_mlp_fc1", Base("x", None, {"unet": {}}))
    'second text encoder'
    """
    roles = [role for role, _ in readings(name)]
    return "" if any(components(role, base) for role in roles) else WORDS.get(roles[0], "")


def may_mean(name: str, component: str) -> bool:
    """Whether a name can denote a module of `component` in some base model.

    >>> may_mean("lora_te1_x", "text_encoder"), may_mean("lora_te1_x", "unet"), may_mean("conv_in", "unet")
    (True, False, True)
    """
    return any(role == ANY or component in dict(ROLES[role]) for role, _ in readings(name))
