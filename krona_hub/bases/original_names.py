"""Original names of the layers and norms of each transformer, where they differ from the diffusers names.

Tables (`originals/*.txt`): FLUX.1 and Chroma, FLUX.2, SD3/SD3.5, AuraFlow, HunyuanVideo, Lumina 2, Z-Image, Krea 2,
Wan 2.1, Sana, and the OpenCLIP text encoders of ldm checkpoints; U-Nets follow the rule in `ldm_names.py`. Qwen-Image
and HiDream have identical original and diffusers names. PixArt-Σ has no table: no current application reads its
original names. `tests/bases/test_original_names.py` checks each table with diffusers' own converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Literal, NamedTuple

from krona_hub.bases.module_spec import ModuleSpec
from krona_hub.bases.name_rules import Rule, parse


class Original(NamedTuple):
    """An architecture, the table of its original names, and the names that ComfyUI reads."""

    name: str
    needs: tuple[str, ...]  # combination of modules unique to this architecture
    table: str | None = None  # file of originals/; None if both names are the same
    comfyui: Literal["diffusers", "original"] = "original"  # after `transformer.` or after `diffusion_model.`

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of the table; () without a table."""
        return _table(self.table) if self.table else ()


ORIGINALS = (  # the first with all of `needs` applies
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
    """The architecture of a component; None if not listed (for U-Nets see `ldm_names.py`)."""
    return next((o for o in ORIGINALS if all(path in modules for path in o.needs)), None)


@cache
def _table(name: str) -> tuple[Rule, ...]:
    return parse(files("krona_hub.bases").joinpath("originals", f"{name}.txt").read_text("utf-8"))
