"""Stand-ins of checkpoints with the names of their authors, and the converters of diffusers that read them.

A stand-in weight has the true height and one column; its numbers tell the layer and the row, so that a wrong name, a
wrong row range or a half that was not swapped shows.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from krona_hub.bases import catalog
from krona_hub.bases.families import FAMILIES
from krona_hub.bases.module_spec import ModuleSpec, Placement
from krona_hub.bases.name_table import table
from krona_hub.bases.original_names import AUTHORS, COMFYUI

Placements = tuple[Placement, ...]

CONVERTERS = {  # base -> function of diffusers.loaders.single_file_utils, between `convert_` and `_to_diffusers`
    **dict.fromkeys(("flux1-dev", "flux1-schnell", "flux1-fill", "flex1-alpha"), "flux_transformer_checkpoint"),
    "chroma": "chroma_transformer_checkpoint",
    **dict.fromkeys(("flux2-dev", "flux2-klein-4b", "flux2-klein-9b"), "flux2_transformer_checkpoint"),
    "flux3": "flux3_transformer_checkpoint",
    **dict.fromkeys(("sd3-medium", "sd35-medium", "sd35-large"), "sd3_transformer_checkpoint"),
    "auraflow": "auraflow_transformer_checkpoint",
    **dict.fromkeys(("hunyuan-video", "hunyuan-video-i2v"), "hunyuan_video_transformer"),
    "lumina2": "lumina2",
    **dict.fromkeys(("z-image", "z-image-omni"), "z_image_transformer_checkpoint"),
    "krea2": "krea2_transformer_checkpoint",
    **dict.fromkeys(
        ("wan21-t2v-1.3b", "wan21-t2v-14b", "wan21-i2v-14b", "wan21-flf2v-14b", "wan22-ti2v-5b", "wan21-vace-1.3b",
         "wan22-animate-14b", "skyreels-v2-i2v-1.3b"), "wan_transformer"
    ),
    "wan22-animate2-14b": "wan_animate_2_transformer",
    **dict.fromkeys(("sana-600m", "sana-1600m"), "sana_transformer"),
    "hidream-i1": "hidream_transformer",
    **dict.fromkeys(("ltx-video-2b", "ltx-video-13b"), "ltx_transformer_checkpoint"),
    **dict.fromkeys(("ltx-2", "ltx-2.3"), "ltx2_transformer"),
    "mochi": "mochi_transformer_checkpoint",
    **dict.fromkeys(("cosmos-predict2-2b-t2i", "cosmos-predict25-2b"), "cosmos_transformer_checkpoint"),
    "minimax-h3": "minimax_h3_transformer_checkpoint",
    "ernie-image": "ernie_image_transformer_checkpoint",
    "qwen-image-21": "qwen_image21_transformer_checkpoint",
    **dict.fromkeys(("stable-cascade", "stable-cascade-decoder"), "stable_cascade_unet_single_file"),
}  # fmt: skip
SPELLING = {"qwen-image-21": COMFYUI}  # of the checkpoints that a converter reads, if not that of the authors
PREFIX = {"cosmos-predict2-2b-t2i": "net.", "cosmos-predict25-2b": "net."}
RENAMED = {  # what diffusers' conversion scripts rename, and the converters of diffusers 0.42.1 forget
    "ltx-2.3": ("prompt_adaln_single", "prompt_adaln"),
    "wan21-flf2v-14b": ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
}
STACKED = ".attn.in_proj"  # attention of PyTorch, whose parameters are `in_proj_weight` and `in_proj_bias`


def convert(base: str, checkpoint: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """What diffusers makes of a checkpoint of the denoiser of `base`."""
    from diffusers.loaders import single_file_utils

    function = getattr(single_file_utils, f"convert_{CONVERTERS[base]}_to_diffusers")
    file = FAMILIES[base].components[denoiser(base)]
    converted = function(checkpoint, config=dict(catalog.component(file).config))
    return {name.replace(*RENAMED.get(base, ("", ""))): tensor for name, tensor in converted.items()}


def denoiser(base: str) -> str:
    return catalog.get(base).denoiser


def stand_ins(modules: Mapping[str, ModuleSpec]) -> dict[str, Tensor]:
    """path -> (out, 1): the number of the layer times 100,000 plus the row."""
    return {
        path: torch.arange(module.shape[0], dtype=torch.int64)[:, None] + 100_000 * number
        for number, (path, module) in enumerate(modules.items(), start=1)
    }


def stacked(places: Placements, weights: Mapping[str, Tensor]) -> Tensor:
    """The weight that the original code stores, by what the placements say."""
    parts = []
    for place in places:
        weight = weights[place.layer.partition(".")[2]]
        weight = weight[slice(*place.part)] if place.part else weight
        parts.append(torch.cat(weight.chunk(2)[::-1]) if place.swap_halves else weight)
    if places[0].shared_with:
        return parts[0]  # the other layers have weights of their own here
    whole = torch.cat(parts)
    for place, part in zip(places, parts, strict=True):
        start, end = place.rows or (0, len(whole))
        assert torch.equal(whole[start:end], part)
    return whole


class Checkpoint(dict):
    """Weights only: a bias, a norm or a table that a converter takes out is made up."""

    heights: Mapping[str, Tensor]

    def pop(self, key, *default):
        if key in self or default:
            return super().pop(key, *default)
        height = len(self.heights.get(key.removesuffix(".bias"), ".." * 6))
        return torch.zeros(height, dtype=torch.int64)


def homes(base: str, component: str) -> dict[str, Placements]:
    """Every module of a checkpoint: the names of a spelling, and those that no rule renames."""
    names = dict(table(catalog.get(base)).parts[component].spellings.get(SPELLING.get(base, AUTHORS), {}))
    covered = {place.layer for places in names.values() for place in places}
    layers = {path: f"{component}.{path}" for path in catalog.get(base).components[component]}
    return names | {path: (Placement(layer),) for path, layer in layers.items() if layer not in covered}


def named(name: str, ending: str) -> str:
    """The name of the weight or bias of a module.

    >>> named("up.attn.in_proj", "bias"), named("up.linear", "bias")
    ('up.attn.in_proj_bias', 'up.linear.bias')
    """
    return f"{name}_{ending}" if name.endswith(STACKED) else f"{name}.{ending}"


def original_checkpoint(base: str, component: str, prefix: str = "") -> Checkpoint:
    weights = stand_ins(catalog.get(base).components[component])
    tensors = {name: stacked(places, weights) for name, places in homes(base, component).items()}
    checkpoint = Checkpoint({prefix + named(name, "weight"): tensor for name, tensor in tensors.items()})
    checkpoint.heights = tensors
    return checkpoint
