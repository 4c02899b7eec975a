"""The names of a diffusers U-Net in the original latent-diffusion code (ldm, sgm), by the rule of FORMATS §12.2.

No model needs a table: block numbers follow from L, the layers per block, which the module names imply, so the
rule covers U-Nets of any configuration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from krona_hub.bases.module_spec import ModuleSpec, Placement

TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
BLOCK = re.compile(r"(down_blocks|up_blocks)\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
MIDDLE = re.compile(r"(mid_block\.(?:resnets|attentions)\.\d+)\.(.+)")


def is_unet(modules: Mapping[str, ModuleSpec]) -> bool:
    """Whether the modules are those of a diffusers U-Net."""
    return "conv_in" in modules and "mid_block.resnets.0.conv1" in modules


def is_sdxl_like(modules: Mapping[str, ModuleSpec]) -> bool:
    """Whether a U-Net has added conditions (SDXL and its refiner), for which sd-scripts writes ldm names."""
    return "add_embedding.linear_1" in modules


def names(modules: Mapping[str, ModuleSpec], paths: Iterable[str] | None = None) -> dict[str, tuple[Placement, ...]]:
    """ldm name -> placement (layer: path within the component) of every module of a U-Net; {} for other models.

    With `paths`, of those instead: norms, whose names follow the same rule.
    """
    if not is_unet(modules):
        return {}
    layers = sum(f"down_blocks.0.resnets.{i}.conv1" in modules for i in range(16))  # L
    named = ((path, _ldm(path, layers, modules)) for path in (modules if paths is None else paths))
    return {ldm: (Placement(path),) for path, ldm in named if ldm}


def _ldm(path: str, layers: int, modules: Mapping[str, ModuleSpec]) -> str | None:
    if path in TOP:
        return TOP[path]
    if middle := MIDDLE.fullmatch(path):
        return f"{TOP[middle[1]]}.{_inner(middle[2])}" if middle[1] in TOP else None
    if block := BLOCK.fullmatch(path):
        side, number, kind, index, rest = block.groups()
        return RULES[side, kind](int(number), int(index), rest, layers, modules)
    return None


def _inner(rest: str) -> str:
    return RESNET.get(rest, rest)


Rule = Callable[[int, int, str, int, Mapping[str, ModuleSpec]], str]


def _up_sampler(b: int, _: int, rest: str, n: int, modules: Mapping[str, ModuleSpec]) -> str:
    """Last in its block, after the attention if the block has one."""
    index = 2 if f"up_blocks.{b}.attentions.{n}.proj_in" in modules else 1
    return f"output_blocks.{b * (n + 1) + n}.{index}.{rest}"


RULES: Mapping[tuple[str, str], Rule] = {  # b: block, i: layer in the block, n: layers per block
    ("down_blocks", "resnets"): lambda b, i, rest, n, _: f"input_blocks.{b * (n + 1) + i + 1}.0.{_inner(rest)}",
    ("down_blocks", "attentions"): lambda b, i, rest, n, _: f"input_blocks.{b * (n + 1) + i + 1}.1.{rest}",
    ("down_blocks", "downsamplers"): lambda b, i, rest, n, _: f"input_blocks.{(b + 1) * (n + 1)}.0.op",
    ("up_blocks", "resnets"): lambda b, i, rest, n, _: f"output_blocks.{b * (n + 1) + i}.0.{_inner(rest)}",
    ("up_blocks", "attentions"): lambda b, i, rest, n, _: f"output_blocks.{b * (n + 1) + i}.1.{rest}",
    ("up_blocks", "upsamplers"): _up_sampler,
}
