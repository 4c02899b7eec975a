"""Other names of the layers and norms of each transformer: those of its authors, of ComfyUI and of trainers.

A spelling is a table in `originals/`: `<architecture>.txt` for the names of the released checkpoint, which sd-scripts,
musubi-tuner and most trainers use, and `<architecture>.<who>.txt` for other programs. An architecture without a table
has the diffusers names everywhere; U-Nets follow the rule in `ldm_names.py`. `tests/bases/test_original_names.py`
checks the tables with the converters of diffusers, `tests/bases/test_names_of_others.py` with verified lists of names.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import NamedTuple

from krona_hub.bases.module_spec import ModuleSpec
from krona_hub.bases.name_rules import Lookup, Rule, lookup_of, parse

AUTHORS, COMFYUI = "authors", "comfyui"  # spellings of the released checkpoint and of ComfyUI
NO_SPELLINGS: Mapping[str, str] = MappingProxyType({})


class Original(NamedTuple):
    """An architecture and its spellings."""

    name: str
    needs: tuple[str, ...]  # modules unique to this architecture, some with their shape: "proj_out 16x2304"
    spellings: Mapping[str, str] = NO_SPELLINGS  # who writes the names -> file of originals/
    in_files: bool = True  # whether adapters have the authors' names, rather than checkpoints alone
    unclear: tuple[str, ...] = ()  # ends of names of norms that mean another norm in another spelling

    def rules(self, spelling: str) -> tuple[Rule, ...]:
        """The rules of a spelling."""
        return _table(self.spellings[spelling])

    def lookup(self, spelling: str) -> Lookup:
        """The same rules by the names that they are for."""
        return _lookup(self.spellings[spelling])


def _same(name: str) -> dict[str, str]:
    return {AUTHORS: name}


def _both(name: str) -> dict[str, str]:
    return {AUTHORS: name, COMFYUI: f"{name}.comfyui"}


QKV = {"qkv": "flux1.qkv"}  # the first rows of a fused module, which ComfyUI also finds by a name


ORIGINALS = (  # the first with all of `needs` applies
    Original("chroma", ("distilled_guidance_layer.in_proj", "x_embedder"), _same("flux1") | QKV),
    Original("framepack", ("clean_x_embedder.proj",), {COMFYUI: "framepack.comfyui"}),
    Original("hunyuan-video-15", ("context_embedder_2.linear_1", "image_embedder.linear_1"), _both("hunyuan-video-15")),
    Original(
        "hunyuan-image", ("context_embedder_2.linear_1",), _both("hunyuan-image") | {"split": "hunyuan-image.split"}
    ),
    Original(
        "hunyuan-video", ("context_embedder.proj_in", "single_transformer_blocks.0.proj_mlp"), _both("hunyuan-video")
    ),
    Original("flux2", ("single_transformer_blocks.0.attn.to_qkv_mlp_proj",), _same("flux2")),
    Original("flux3", ("x_embedders.image",), _same("flux3")),
    Original(
        "ovis-image", ("timestep_embedder.linear_1", "single_transformer_blocks.0.proj_mlp"), _both("ovis-image") | QKV
    ),
    Original(
        "longcat-image",
        ("time_embed.timestep_embedder.linear_1", "single_transformer_blocks.0.proj_mlp", "context_embedder 3072x3584"),
        {COMFYUI: "longcat-image.comfyui"} | QKV,
    ),
    Original("bria", ("time_embed.timestep_embedder.linear_1", "single_transformer_blocks.0.proj_mlp")),
    Original(
        "flux1",
        ("single_transformer_blocks.0.proj_mlp", "x_embedder"),
        _same("flux1") | {"xlabs": "flux1.xlabs"} | QKV,
    ),
    Original("auraflow", ("joint_transformer_blocks.0.ff.linear_1",), _same("auraflow")),
    Original("sd3", ("pos_embed.proj", "transformer_blocks.0.attn.add_q_proj"), _same("sd3")),
    Original("lumina-next", ("time_caption_embed.caption_embedder.1", "layers.0.attn2.to_k"), _same("lumina-next")),
    Original("omnigen2", ("ref_image_patch_embedder",)),
    Original("lumina2", ("time_caption_embed.caption_embedder.1", "layers.0.norm1.linear"), _same("lumina2")),
    Original("z-image", ("all_x_embedder.2-1",), _same("z-image")),
    Original("krea2", ("text_fusion.projector",), _same("krea2")),
    Original("anyflow", ("condition_embedder.delta_embedder.linear_1",)),
    Original("helios", ("patch_short",)),
    Original("wan", ("condition_embedder.time_proj", "blocks.0.attn1.to_q"), _same("wan")),
    Original("wan-animate2", ("img_emb.proj.1", "blocks.0.self_attn.to_q"), _same("wan-animate2")),
    Original("ltx-2", ("audio_proj_in", "audio_time_embed.linear"), _same("ltx-2")),
    Original("ltx-video", ("proj_in", "time_embed.linear", "caption_projection.linear_1"), _same("ltx-video")),
    Original("sana-sprint", ("time_embed.guidance_embedder.linear_1",)),
    Original("sana-video", ("transformer_blocks.0.ff.conv_temp",)),
    Original("sana", ("transformer_blocks.0.ff.conv_inverted",), _same("sana")),
    Original(
        "cosmos", ("time_embed.t_embedder.linear_1", "transformer_blocks.0.norm1.linear_1"), _same("cosmos-predict2")
    ),
    Original("mochi", ("time_embed.pooler.to_kv",), _same("mochi")),
    Original("hunyuan-dit", ("time_extra_emb.pooler.q_proj",), _same("hunyuan-dit"), unclear=(".norm2", ".norm3")),
    Original(
        "cogvideox",
        ("patch_embed.text_proj", "time_embedding.linear_1"),
        {"sat": "cogvideox", COMFYUI: "cogvideox.comfyui"},
    ),
    Original(
        "cogview", ("patch_embed.text_proj", "time_condition_embed.timestep_embedder.linear_1"), {"sat": "cogview4"}
    ),
    Original("glm-image", ("glyph_projector.net.2",)),
    Original("ideogram4", ("llm_cond_proj", "layers.0.attention.to_q"), _same("ideogram4")),
    Original("stable-cascade", ("clip_txt_mapper",), _both("stable-cascade"), in_files=False),
    Original("stable-cascade-decoder", ("clip_txt_pooled_mapper",), _both("stable-cascade-decoder"), in_files=False),
    Original(
        "qwen-image-21",
        ("transformer_blocks.0.img_mlp.gate_layer",),
        {COMFYUI: "qwen-image-21.comfyui"},
    ),
    Original("qwen-image", ("transformer_blocks.0.img_mlp.net.0.proj",)),
    Original("kandinsky5", ("visual_transformer_blocks.0.self_attention.to_query",)),
    Original("ernie-image", ("layers.0.self_attention.to_q", "text_proj")),
    Original("joyimage-edit", ("double_blocks.0.attn.img_attn_qkv",)),
    Original("minimax-h3", ("audio_proj_in", "token_refiner.refiner_blocks.0.attn.to_q"), _same("minimax-h3")),
    Original("omnigen", ("patch_embedding.output_image_proj",)),
    Original("prx", ("blocks.0.attention.img_qkv_proj",)),
    Original("hidream", ("double_stream_blocks.0.block.attn1.to_q_t",)),
    Original("allegro", ("caption_projection.linear_1", "pos_embed.proj 2304x4x2x2")),
    Original("pixart", ("adaln_single.linear", "caption_projection.linear_1"), _same("pixart")),
    Original("openclip", ("encoder.layers.0.self_attn.q_proj",), _same("openclip")),
)


def original_of(modules: Mapping[str, ModuleSpec]) -> Original | None:
    """The architecture of a component; None if not listed (for U-Nets see `ldm_names.py`)."""
    return next((o for o in ORIGINALS if all(_has(modules, need) for need in o.needs)), None)


def _has(modules: Mapping[str, ModuleSpec], need: str) -> bool:
    path, _, shape = need.partition(" ")
    module = modules.get(path)
    return module is not None and shape in ("", "x".join(map(str, module.shape)))


@cache
def _table(name: str) -> tuple[Rule, ...]:
    return parse(files("krona_hub.bases").joinpath("originals", f"{name}.txt").read_text("utf-8"))


@cache
def _lookup(name: str) -> Lookup:
    return lookup_of(_table(name))
