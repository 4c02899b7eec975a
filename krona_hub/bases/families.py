"""Named base models: their components and Hub ids.

A component is a file of `components/`; base models share text encoders. `uncovered` names the adaptable parts of a
pipeline that the catalog does not list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Family(NamedTuple):
    """A named base model."""

    title: str
    components: Mapping[str, str]  # component -> file of the catalog
    hub_ids: tuple[str, ...] = ()  # the first one is shown
    uncovered: tuple[str, ...] = ()


CLIP_L = {"text_encoder": "clip-l.text"}
CLIP_H = {"text_encoder": "openclip-h.text"}
CLIP_G = {"text_encoder_2": "openclip-bigg.text"}
FLUX_TEXT = CLIP_L | {"text_encoder_2": "t5-xxl.text"}
SD3_TEXT = {"text_encoder": "clip-l-proj.text", **CLIP_G, "text_encoder_3": "t5-xxl.text"}
T5 = {"text_encoder": "t5-xxl.text"}
UMT5 = {"text_encoder": "umt5-xxl.text"}
GEMMA = {"text_encoder": "gemma2-2b.text"}
QWEN3_4B = {"text_encoder": "qwen3-4b.text"}
QWEN3_8B = {"text_encoder": "qwen3-8b.text"}
TINY_TEXT = {"text_encoder": "tiny-scenes.text"}
HIDREAM_TEXT = SD3_TEXT | {"text_encoder_4": "llama31-8b.text"}


def _unet(name: str, text: Mapping[str, str]) -> dict[str, str]:
    return {"unet": f"{name}.unet", **text}


def _dit(name: str, text: Mapping[str, str]) -> dict[str, str]:
    return {"transformer": f"{name}.transformer", **text}


FAMILIES: Mapping[str, Family] = {
    "sd15": Family(
        "Stable Diffusion 1.5",
        _unet("sd15", CLIP_L),
        (
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "runwayml/stable-diffusion-v1-5",
            "CompVis/stable-diffusion-v1-4",
        ),
    ),
    "sd21-base": Family(
        "Stable Diffusion 2.1 base (512 px)",
        _unet("sd21-base", CLIP_H),
        ("stabilityai/stable-diffusion-2-1-base", "stabilityai/stable-diffusion-2-base"),
    ),
    "sd21": Family(
        "Stable Diffusion 2.1 (768 px)",
        _unet("sd21", CLIP_H),
        ("stabilityai/stable-diffusion-2-1", "stabilityai/stable-diffusion-2"),
    ),
    "sdxl": Family(
        "Stable Diffusion XL", _unet("sdxl", CLIP_L | CLIP_G), ("stabilityai/stable-diffusion-xl-base-1.0",)
    ),
    "sdxl-refiner": Family(
        "Stable Diffusion XL refiner", _unet("sdxl-refiner", CLIP_G), ("stabilityai/stable-diffusion-xl-refiner-1.0",)
    ),
    "sd3-medium": Family(
        "Stable Diffusion 3 medium", _dit("sd3-medium", SD3_TEXT), ("stabilityai/stable-diffusion-3-medium-diffusers",)
    ),
    "sd35-medium": Family(
        "Stable Diffusion 3.5 medium", _dit("sd35-medium", SD3_TEXT), ("stabilityai/stable-diffusion-3.5-medium",)
    ),
    "sd35-large": Family(
        "Stable Diffusion 3.5 large",
        _dit("sd35-large", SD3_TEXT),
        ("stabilityai/stable-diffusion-3.5-large", "stabilityai/stable-diffusion-3.5-large-turbo"),
    ),
    "flux1-dev": Family("FLUX.1 dev", _dit("flux1-dev", FLUX_TEXT), ("black-forest-labs/FLUX.1-dev",)),
    "flux1-schnell": Family("FLUX.1 schnell", _dit("flux1-schnell", FLUX_TEXT), ("black-forest-labs/FLUX.1-schnell",)),
    "chroma": Family("Chroma", _dit("chroma", T5), ("lodestones/Chroma1-HD", "lodestones/Chroma1-Base")),
    "flux2-dev": Family(
        "FLUX.2 dev", _dit("flux2-dev", {}), ("black-forest-labs/FLUX.2-dev",), ("text_encoder (Mistral Small 3)",)
    ),
    "flux2-klein-4b": Family(
        "FLUX.2 klein 4B", _dit("flux2-klein-4b", QWEN3_4B), ("black-forest-labs/FLUX.2-klein-4B",)
    ),
    "flux2-klein-9b": Family(
        "FLUX.2 klein 9B", _dit("flux2-klein-9b", QWEN3_8B), ("black-forest-labs/FLUX.2-klein-9B",)
    ),
    "z-image": Family("Z-Image", _dit("z-image", QWEN3_4B), ("Tongyi-MAI/Z-Image-Turbo", "Tongyi-MAI/Z-Image")),
    "qwen-image": Family("Qwen-Image", _dit("qwen-image", {}), ("Qwen/Qwen-Image",), ("text_encoder (Qwen2.5-VL 7B)",)),
    "pixart-sigma-xl": Family("PixArt-Σ XL", _dit("pixart-sigma-xl", T5), ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",)),
    "lumina2": Family("Lumina-Image 2.0", _dit("lumina2", GEMMA), ("Alpha-VLLM/Lumina-Image-2.0",)),
    "sana-1600m": Family(
        "Sana 1600M", _dit("sana-1600m", GEMMA), ("Efficient-Large-Model/Sana_1600M_1024px_diffusers",)
    ),
    "hidream-i1": Family(
        "HiDream-I1",
        _dit("hidream-i1", HIDREAM_TEXT),
        ("HiDream-ai/HiDream-I1-Full", "HiDream-ai/HiDream-I1-Dev", "HiDream-ai/HiDream-I1-Fast"),
    ),
    "wan21-t2v-1.3b": Family("Wan 2.1 T2V 1.3B", _dit("wan21-t2v-1.3b", UMT5), ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",)),
    "wan21-t2v-14b": Family(
        "Wan 2.1 T2V 14B (and each expert of Wan 2.2 A14B)",
        _dit("wan21-t2v-14b", UMT5),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan-AI/Wan2.2-T2V-A14B-Diffusers"),
    ),
    "hunyuan-video": Family(
        "HunyuanVideo",
        _dit("hunyuan-video", {"text_encoder_2": "clip-l.text"}),
        ("hunyuanvideo-community/HunyuanVideo",),
        ("text_encoder (LLaVA Llama 3 8B)",),
    ),
    "krea2": Family("Krea 2", _dit("krea2", {}), (), ("text_encoder (Qwen3-VL)",)),
    "auraflow": Family(
        "AuraFlow v0.3", _dit("auraflow", {"text_encoder": "pile-t5-xl.text"}), ("fal/AuraFlow-v0.3", "fal/AuraFlow")
    ),
    "tiny-scenes": Family("tiny-scenes, the small base model shipped with krona_hub", _unet("tiny-scenes", TINY_TEXT)),
}

ALIASES: Mapping[str, str] = {  # common alternative names
    "sd1": "sd15", "sd1.5": "sd15", "sd14": "sd15", "sd-1.5": "sd15", "sd2": "sd21", "sd2.1": "sd21", "sd-xl": "sdxl",
    "sdxl-base": "sdxl", "sd3": "sd3-medium", "sd3.5-medium": "sd35-medium", "sd3.5-large": "sd35-large",
    "flux": "flux1-dev", "flux1": "flux1-dev", "flux-dev": "flux1-dev", "flux-schnell": "flux1-schnell",
    "flux2": "flux2-dev", "zimage": "z-image", "qwenimage": "qwen-image", "pixart-sigma": "pixart-sigma-xl",
    "sana": "sana-1600m", "hidream": "hidream-i1", "wan21-1.3b": "wan21-t2v-1.3b", "wan21-14b": "wan21-t2v-14b",
}  # fmt: skip
