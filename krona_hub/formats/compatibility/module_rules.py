"""Rules of applications about one stored module: its tensors, their dtypes, its scale. Torch-free.

Each returns why an application applies the module wrongly or not at all, as a clause, or None. Files that krona writes
for an application follow them by construction, and are checked with them all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from krona_hub.bases.module_spec import Placement
from krona_hub.checkpoints.header import TensorInfo
from krona_hub.formats.forms.delta_form import channel_split
from krona_hub.formats.reading.description import ModuleInfo

PRODUCTS = (("w1_a", "w1_b"), ("w2_a", "w2_b"), ("up", "down"))  # tensors that are multiplied with one another


class StoredModule(NamedTuple):
    """One module of a file, with the sizes of its tensors."""

    info: ModuleInfo
    parts: Mapping[str, TensorInfo]  # up, down, mid, alpha, w1, w2_a, … -> size and dtype
    keys: Mapping[str, str]  # part -> key of the file
    places: tuple[Placement, ...]  # the layers, or rows of layers, that it stores


def lokr_tucker(module: StoredModule) -> str | None:
    return "it is a LoKr with a Tucker core" if "t2" in module.parts and module.info.kind == "lokr" else None


def tucker(module: StoredModule) -> str | None:
    return "it has a Tucker core" if {"t2", "mid", "t1"} & module.parts.keys() else None


def locon_tucker(module: StoredModule) -> str | None:
    return "it is a LoRA with a Tucker core" if "mid" in module.parts else None


def deep_w2(module: StoredModule) -> str | None:
    """Loaders align the dimensions of w1 for a four-dimensional w2 only; a flat w2 is right in all of them."""
    w2 = module.parts.get("w2")
    deep = w2 is not None and len(w2.shape) == 5
    return "its w2 has five dimensions, whose product with w1 is wrong or fails" if deep else None


def flat_w2(module: StoredModule) -> str | None:
    """Trainers build the w2 of a convolution with its kernel dimensions."""
    w2 = module.parts.get("w2")
    flat = w2 is not None and len(w2.shape) == 2 and module.info.form.is_conv
    return "its w2 is flat, and a convolution needs the dimensions of the kernel" if flat else None


def missing_alpha(module: StoredModule) -> str | None:
    return "it has no alpha, which stops the load" if "alpha" not in module.parts else None


def lokr_without_alpha(module: StoredModule) -> str | None:
    return missing_alpha(module) if module.info.kind == "lokr" else None


def other_scale(module: StoredModule) -> str | None:
    """ai-toolkit takes the scale from its settings: 1 for transformers, one value for all layers of a U-Net."""
    info = module.info
    is_unet = any(layer.startswith("unet.") for layer in info.layers)
    lost = not is_unet and info.scale != 1
    return f"alpha is ignored, so that the scale is 1 instead of {info.scale:g}" if lost else None


def factored_w1(module: StoredModule) -> str | None:
    return "its w1 is a product, which is passed over" if "w1_a" in module.parts else None


def two_dtypes(module: StoredModule) -> str | None:
    """A product of a LoKr in two dtypes; loaders copy those of a LoRA into one."""
    return unequal_dtypes(module) if module.info.kind == "lokr" else None


def unequal_dtypes(module: StoredModule) -> str | None:
    """A product of two dtypes."""
    parts = module.parts
    for one, other in PRODUCTS:
        if one in parts and other in parts and parts[one].dtype != parts[other].dtype:
            return f"{one} is {parts[one].dtype} and {other} is {parts[other].dtype}, and a product of two dtypes fails"
    return None


def scale_outside(module: StoredModule) -> str | None:
    """Whether the scale is in the metadata of the file, or derived otherwise than from an alpha."""
    info = module.info
    if "alpha" in module.parts or info.scale == 1 or info.kind == "cdka":
        return None
    return f"its scale of {info.scale:g} is in the metadata, which are ignored"


def kohya_dora(module: StoredModule) -> str | None:
    """diffusers reads a DoRA magnitude as `lora_magnitude_vector` only."""
    return "its dora_scale is dropped" if "dora_scale" in module.parts else None


def bare_magnitude(module: StoredModule) -> str | None:
    """The magnitude of ai-toolkit, which diffusers' converters do not know."""
    key = next((k for k in module.keys.values() if k.endswith(".magnitude")), None)
    return f"the key {key} is refused" if key else None


def unit_rank(module: StoredModule) -> str | None:
    """stable-diffusion.cpp drops a dimension of size 1, and divides alpha by the width of the factor instead."""
    lost = module.info.rank == 1 and "alpha" in module.parts
    return "alpha of rank 1 is divided by the width of the factor instead of 1" if lost else None


def runtime_lokr(module: StoredModule) -> str | None:
    """The forms of a LoKr that stable-diffusion.cpp applies both when loading and at run time."""
    if module.info.kind != "lokr":
        return None
    if module.info.form.is_conv:
        fits = "w1" in module.parts and "w2_a" in module.parts
        return None if fits else "of a convolution, only a LoKr with a full w1 and a factored w2 is right in both modes"
    fits = "w1" in module.parts and "w2" in module.parts
    return None if fits else "it is a LoKr with a factored matrix, which aborts when applied at run time"


def uneven_w1_rank(module: StoredModule) -> str | None:
    """InvokeAI divides alpha by the rank of w1_b where w1 is a product, also where that of w2_b differs."""
    info = module.info
    if info.kind != "lokr" or info.left_rank is None or info.right_rank is None or info.alpha is None:
        return None
    if info.left_rank == info.right_rank:
        return None
    return f"alpha is divided by the rank {info.left_rank} of w1 instead of {info.right_rank} of w2"


def foreign_magnitude(module: StoredModule) -> str | None:
    """ComfyUI and its relatives read a magnitude as `dora_scale` only."""
    key = next((k for k in module.keys.values() if ".lora_magnitude_vector" in k or k.endswith(".magnitude")), None)
    return f"the key {key} is ignored" if key else None


def other_names(module: StoredModule) -> str | None:
    """LyCORIS wraps a model with `lycoris_` names, and as a network of sd-scripts, U-Nets with kohya's names."""
    name, layers = module.info.name, module.info.layers
    is_unet = all(layer.startswith(("unet.", "prior.", "decoder.", "text_encoder")) for layer in layers)
    if name.startswith("lycoris_") or (is_unet and name.startswith("lora_")):
        return None
    return "LyCORIS finds modules by names that begin with lycoris_"


def even_products(module: StoredModule) -> str | None:
    """LyCORIS keeps w1 as a product only beside a w2 of the same rank."""
    info = module.info
    if info.kind != "lokr" or info.left_rank is None or info.left_rank == info.right_rank:
        return None
    return "w1 is a product, but w2 is not a product of the same rank"


def whole_kernel(module: StoredModule) -> str | None:
    """Whether A extends into a kernel; trainers cannot build such modules."""
    info = module.info
    if info.kind != "lokr" or not info.form.is_conv:
        return None
    first, second = channel_split(info.form).in_
    return None if first * second == info.weight_shape[1] else "its A splits the kernel"
