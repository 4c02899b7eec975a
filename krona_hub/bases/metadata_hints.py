"""Base models named in the metadata of adapter files, as various trainers write them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping

from krona_hub.bases import catalog

FLUX1 = ("flux1-dev", "flux1-schnell")
WAN = (
    "wan21-t2v-1.3b", "wan21-t2v-14b", "wan21-i2v-14b", "wan21-flf2v-14b", "wan22-i2v-a14b", "wan22-ti2v-5b",
    "wan21-vace-1.3b", "wan21-vace-14b",
)  # fmt: skip
HUNYUAN_VIDEO = ("hunyuan-video", "hunyuan-video-i2v", "hunyuan-video-i2v-33ch")
HUNYUAN_VIDEO_15 = ("hunyuan-video-15", "hunyuan-video-15-step-distilled")
HUNYUAN_IMAGE = ("hunyuan-image-21", "hunyuan-image-21-distilled")
KANDINSKY5 = (
    "kandinsky5-lite-video", "kandinsky5-pro-video", "kandinsky5-lite-image", "kandinsky5-lite-image-edit",
)  # fmt: skip
VERSIONS: tuple[tuple[str, tuple[str, ...]], ...] = (  # start of ss_base_model_version (sd-scripts, musubi-tuner)
    ("sd_v1", ("sd15",)),
    ("sd_1.5", ("sd15",)),
    ("sd_v2_768", ("sd21",)),
    ("sd_v2", ("sd21-base",)),
    ("sd_2.1", ("sd21", "sd21-base")),
    ("sdxl_refiner", ("sdxl-refiner",)),
    ("sdxl", ("sdxl",)),
    ("sd3.5-large", ("sd35-large",)),
    ("sd3.5_l", ("sd35-large",)),
    ("sd3.5", ("sd35-medium",)),
    ("sd3", ("sd3-medium",)),
    ("chroma", ("chroma",)),
    ("flux2_klein_4b", ("flux2-klein-4b",)),
    ("flux2_klein_9b", ("flux2-klein-9b",)),
    ("flux2", ("flux2-dev",)),
    ("flux_2_klein_4b", ("flux2-klein-4b",)),
    ("flux_2_klein_9b", ("flux2-klein-9b",)),
    ("flux_2", ("flux2-dev",)),
    ("flux_kontext", ("flux1-dev",)),
    ("flux", FLUX1),
    ("lumina2", ("lumina2",)),
    ("lumina", ("lumina2",)),
    ("zimage", ("z-image",)),
    ("z_image", ("z-image",)),
    ("qwen_image_layered", ("qwen-image-layered",)),
    ("qwen_image", ("qwen-image",)),
    ("hunyuan_video_1_5", HUNYUAN_VIDEO_15),
    ("hunyuan_video", HUNYUAN_VIDEO),
    ("hunyuan_image", HUNYUAN_IMAGE),
    ("framepack", ("framepack",)),
    ("kandinsky5", KANDINSKY5),
    ("hidream_o1", ("hidream-o1",)),
    ("ideogram4", ("ideogram4",)),
    ("anima", ("anima",)),
    ("wan", WAN),
)
ARCHITECTURES: tuple[tuple[str, tuple[str, ...]], ...] = (  # start of modelspec.architecture
    ("stable-diffusion-v1", ("sd15",)),
    ("stable-diffusion-v2-768", ("sd21",)),
    ("stable-diffusion-v2", ("sd21-base",)),
    ("stable-diffusion-xl-v1-refiner", ("sdxl-refiner",)),
    ("stable-diffusion-xl", ("sdxl",)),
    ("stable-diffusion-3.5-large", ("sd35-large",)),
    ("stable-diffusion-3.5-medium", ("sd35-medium",)),
    ("stable-diffusion-3", ("sd3-medium",)),
    ("flux-1-dev", ("flux1-dev",)),
    ("flux-1-schnell", ("flux1-schnell",)),
    ("flux-2-dev", ("flux2-dev",)),
    ("flux-2-klein-4b", ("flux2-klein-4b",)),
    ("flux-2-klein-9b", ("flux2-klein-9b",)),
    ("flux-2", ("flux2-dev",)),
    ("flux.2-klein-4b", ("flux2-klein-4b",)),
    ("flux.2-klein-9b", ("flux2-klein-9b",)),
    ("flux.2", ("flux2-dev",)),
    ("flux.1-dev", ("flux1-dev",)),
    ("flux", FLUX1),
    ("chroma", ("chroma",)),
    ("lumina-2", ("lumina2",)),
    ("z-image", ("z-image",)),
    ("qwen-image-layered", ("qwen-image-layered",)),
    ("qwen-image", ("qwen-image",)),
    ("auraflow", ("auraflow",)),
    ("hunyuan-video-1.5", HUNYUAN_VIDEO_15),
    ("hunyuan-video", HUNYUAN_VIDEO),
    ("hunyuan-image", HUNYUAN_IMAGE),
    ("framepack", ("framepack",)),
    ("kandinsky-5", KANDINSKY5),
    ("anima", ("anima",)),
    ("wan2", WAN),
)
HUB_KEYS = ("base_model_name_or_path", "ss_base_model", "ss_sd_model_name", "modelspec.base_model", "base_model")


BASE_KEYS = (*HUB_KEYS, "modelspec.architecture", "ss_base_model_version")  # that name a base model


def bases_named(metadata: Mapping[str, str]) -> frozenset[str]:
    """Catalog names of the base models named in the metadata; empty if there are none.

    The most specific entry decides: a Hub id first, then the architecture, then the trainer's version string.

    >>> sorted(bases_named({"ss_base_model_version": "sdxl_base_v1-0"}))
    ['sdxl']
    """
    return next((frozenset(names) for names in _named(metadata) if names), frozenset())


def _named(metadata: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    for key in HUB_KEYS:
        name = catalog.find(_model_name(metadata.get(key, "")))
        yield (name,) if name else ()
    for text in _peft_bases(metadata):
        name = catalog.find(_model_name(text))
        yield (name,) if name else ()
    yield _beginning(ARCHITECTURES, metadata.get("modelspec.architecture", ""))
    yield _beginning(VERSIONS, metadata.get("ss_base_model_version", ""))


def _model_name(text: str) -> str:
    return str(text).removesuffix(".safetensors")


def _beginning(entries: tuple[tuple[str, tuple[str, ...]], ...], text: str) -> tuple[str, ...]:
    return next((names for start, names in entries if text.lower().startswith(start)), ())


def _peft_bases(metadata: Mapping[str, str]) -> list[str]:
    """`base_model_name_or_path` of the configurations in diffusers' `lora_adapter_metadata`."""
    try:
        fields = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        return []
    if not isinstance(fields, dict):
        return []
    return [v for k, v in fields.items() if isinstance(v, str) and re.search(r"(^|\.)base_model_name_or_path$", k)]


PREFIXES = {  # start of the module names of a trainer for one base model
    "Hunyuan_video_I2V_lora_": HUNYUAN_VIDEO,
    "Hunyuan_video_lora_": HUNYUAN_VIDEO,
    "lora_prior_unet_": ("stable-cascade", "stable-cascade-lite"),
}


def bases_of_prefix(modules: Iterable[str]) -> frozenset[str]:
    """Catalog names of the base models of a trainer whose prefix the modules have; empty for any other prefix.

    >>> sorted(bases_of_prefix(["Hunyuan_video_lora_double_blocks_0_img_attn_proj"]))[:1]
    ['hunyuan-video']
    """
    found = (names for module in modules for start, names in PREFIXES.items() if module.startswith(start))
    return frozenset(next(found, ()))
