"""How the authors of each transformer call its modules, where that is not how diffusers does.

Tables (`originals/*.txt`): FLUX.1 and Chroma, FLUX.2, SD3/SD3.5, AuraFlow, HunyuanVideo, Lumina 2, Z-Image, Krea 2,
Wan 2.1, Sana, and the OpenCLIP text encoders of ldm checkpoints; U-Nets follow a rule, in `ldm.py`. Qwen-Image and
HiDream have the same names in both worlds. PixArt-Σ has no table: no tool of today reads its own names.
Each table is checked by running diffusers' own converter on it (`tests/bases/test_original_names.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Literal, NamedTuple

from krona_hub.bases.module_spec import ModuleSpec
from krona_hub.bases.name_rules import Rule, parse


class Original(NamedTuple):
    """An architecture with names of its own, and those that ComfyUI finds for it."""

    name: str
    needs: tuple[str, ...]  # modules that only this architecture has together
    table: str | None = None  # file of originals/, None where both names are the same
    comfyui: Literal["diffusers", "original"] = "original"  # after `transformer.` or after `diffusion_model.`

    @property
    def rules(self) -> tuple[Rule, ...]:
        return _table(self.table) if self.table else ()


ORIGINALS = (  # the first whose `needs` are all there
    Original("chroma", ("distilled_guidance_layer.in_proj",), "flux1", "diffusers"),
    Original("hunyuan-video", ("context_embedder.proj_in", "single_transformer_blocks.0.proj_mlp"), "hunyuan-video"),
    Original("flux2", ("single_transformer_blocks.0.attn.to_qkv_mlp_proj",), "flux2"),
    Original("flux1", ("single_transformer_blocks.0.proj_mlp", "x_embedder"), "flux1", "diffusers"),
    Original("auraflow", ("joint_transformer_blocks.0.ff.linear_1",), "auraflow", "diffusers"),
    Original("sd3", ("pos_embed.proj", "transformer_blocks.0.attn.add_q_proj"), "sd3", "diffusers"),
    Original("lumina2", ("time_caption_embed.caption_embedder.1",), "lumina2"),
    Original("z-image", ("all_x_embedder.2-1",), "z-image", "diffusers"),
    Original("krea2", ("text_fusion.projector",), "krea2", "diffusers"),
    Original("wan", ("condition_embedder.time_proj", "blocks.0.attn1.to_q"), "wan"),
    Original("sana", ("transformer_blocks.0.ff.conv_inverted",), "sana"),
    Original("qwen-image", ("transformer_blocks.0.img_mlp.net.0.proj",), None, "diffusers"),
    Original("hidream", ("double_stream_blocks.0.block.attn1.to_q_t",), None, "diffusers"),
    Original("pixart", ("adaln_single.linear", "caption_projection.linear_1"), None, "diffusers"),
    Original("openclip", ("encoder.layers.0.self_attn.q_proj",), "openclip"),
)


def original_of(modules: Mapping[str, ModuleSpec]) -> Original | None:
    """The architecture of a component, None where it is not listed (U-Nets: see `ldm.py`)."""
    return next((o for o in ORIGINALS if all(path in modules for path in o.needs)), None)


@cache
def _table(name: str) -> tuple[Rule, ...]:
    return parse(files("krona_hub.bases").joinpath("originals", f"{name}.txt").read_text("utf-8"))
