"""Tiny pipelines as one checkpoint with the names of their authors, and back by diffusers' own converters.

`known(pipe, …)` puts a tiny base into the catalog: of a single file, only bases of the catalog are recognised.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import contextmanager
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from krona_hub.bases import catalog, catalog_index, detection, ldm_names, loading
from krona_hub.bases.base import Base

UNET = "model.diffusion_model."
CLIP_L = {"sd15": "cond_stage_model.transformer.text_model.", "sdxl": "conditioner.embedders.0.transformer.text_model."}
OPENCLIP = "conditioner.embedders.1.model."
OPENCLIP_PARTS = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
OPENCLIP_REST = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


@contextmanager
def known(name: str, folder: str):
    """The base in that diffusers folder as one of the catalog, so that its single file is recognised."""
    base = Base(name, name, loading.load_base(folder).components)
    real_names, real_get = catalog.names, catalog.get
    real_promising, real_equals = detection._promising, catalog_index.bases_with
    with (
        patch.object(catalog, "names", lambda: (name, *real_names())),
        patch.object(catalog, "get", lambda wanted: base if wanted == name else real_get(wanted)),
        patch.object(detection, "_promising", lambda modules: [base, *real_promising(modules)]),
        patch.object(
            catalog_index, "bases_with", lambda print_: (name,) if print_ == base.fingerprint else real_equals(print_)
        ),
    ):
        yield base


def save(pipe, path, dtype: torch.dtype | None = None):
    """The pipeline as one file: ldm names with the text encoders and the VAE, or BFL names of the transformer."""
    tensors = {k: v.contiguous() if dtype is None else v.to(dtype).contiguous() for k, v in _tensors(pipe).items()}
    save_file(tensors, path, metadata={"format": "pt", "modelspec.title": "tiny"})
    return path


def load(pipe, path):
    """The pipeline with the numbers of such a file."""
    tensors = load_file(path)
    if hasattr(pipe, "transformer"):
        pipe.transformer.load_state_dict(_from_bfl(tensors))
        return pipe
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_open_clip_checkpoint

    pipe.unet.load_state_dict(convert_ldm_unet_checkpoint(dict(tensors), pipe.unet.config))
    prefix = CLIP_L["sdxl" if hasattr(pipe, "text_encoder_2") else "sd15"]
    _load_text(pipe.text_encoder, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    if hasattr(pipe, "text_encoder_2"):
        _load_text(pipe.text_encoder_2, convert_open_clip_checkpoint(pipe.text_encoder_2, tensors, prefix=OPENCLIP))
    return pipe


def _tensors(pipe) -> dict[str, Tensor]:
    if hasattr(pipe, "transformer"):
        return _to_bfl(pipe.transformer.state_dict())
    sdxl = hasattr(pipe, "text_encoder_2")
    tensors = _unet_tensors(pipe.unet)
    clip = _text_state(pipe.text_encoder)
    tensors |= {f"{CLIP_L['sdxl' if sdxl else 'sd15']}{name}": t for name, t in clip.items()}
    if sdxl:
        tensors |= {f"{OPENCLIP}{name}": t for name, t in _openclip(_text_state(pipe.text_encoder_2)).items()}
    return tensors | {f"first_stage_model.{name}": t for name, t in pipe.vae.state_dict().items()}


# --- U-Net -----------------------------------------------------------------------------------------------------------


def _unet_tensors(unet) -> dict[str, Tensor]:
    modules = loading.modules_in(
        {k: loading.StoredTensor(None, k, tuple(t.shape)) for k, t in unet.state_dict().items()}
    )
    homes = {places[0].layer: name for name, places in ldm_names.names(modules).items()}
    split = {key: key.rpartition(".") for key in unet.state_dict()}
    return {f"{UNET}{_unet_name(split[k][0], homes)}.{split[k][2]}": t for k, t in unet.state_dict().items()}


def _unet_name(path: str, homes: Mapping[str, str]) -> str:
    """The ldm name of a module; those of norms are written out, as an oracle for the names of `krona_hub`."""
    parent, _, leaf = path.rpartition(".")
    if path in homes or path == "conv_norm_out":
        return homes.get(path, "out.0")
    if f"{parent}.conv1" in homes:
        return homes[f"{parent}.conv1"].removesuffix("in_layers.2") + {"norm1": "in_layers.0"}.get(leaf, "out_layers.0")
    attention, rest = re.fullmatch(r"(.*attentions\.\d+)\.(.*)", path).groups()
    return homes[f"{attention}.proj_in"].removesuffix("proj_in") + rest


# --- text encoders ---------------------------------------------------------------------------------------------------


def _text_state(model) -> dict[str, Tensor]:
    return {k.removeprefix("text_model."): t for k, t in model.state_dict().items() if "position_ids" not in k}


def _load_text(model, tensors: Mapping[str, Tensor]) -> None:
    plain = {k.removeprefix("text_model."): t for k, t in tensors.items()}
    model.load_state_dict({k: plain[k.removeprefix("text_model.")] for k in model.state_dict()})


def _openclip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's names: q, k and v are one matrix, and the projection lies the other way round."""
    tensors = {new: state[old] for old, new in OPENCLIP_REST.items()}
    tensors["text_projection"] = state["text_projection.weight"].T
    for block in {re.match(r"encoder\.layers\.(\d+)", k)[1] for k in state if k.startswith("encoder.")}:
        layer, home = f"encoder.layers.{block}", f"transformer.resblocks.{block}"
        for part in ("weight", "bias"):
            tensors[f"{home}.attn.in_proj_{part}"] = torch.cat(
                [state[f"{layer}.self_attn.{x}_proj.{part}"] for x in "qkv"]
            )
            tensors |= {f"{home}.{new}.{part}": state[f"{layer}.{old}.{part}"] for old, new in OPENCLIP_PARTS.items()}
    return tensors


# --- FLUX ------------------------------------------------------------------------------------------------------------

DOUBLE, SINGLE, TIME = "transformer_blocks.0.", "single_transformer_blocks.0.", "time_text_embed."
FUSED = {  # BFL's module -> the modules whose rows it stacks
    "double_blocks.0.img_attn.qkv": [f"{DOUBLE}attn.to_{x}" for x in "qkv"],
    "double_blocks.0.txt_attn.qkv": [f"{DOUBLE}attn.add_{x}_proj" for x in "qkv"],
    "single_blocks.0.linear1": [*(f"{SINGLE}attn.to_{x}" for x in "qkv"), f"{SINGLE}proj_mlp"],
}
SAME = {
    "double_blocks.0.img_attn.proj": f"{DOUBLE}attn.to_out.0",
    "double_blocks.0.txt_attn.proj": f"{DOUBLE}attn.to_add_out",
    "double_blocks.0.img_mlp.0": f"{DOUBLE}ff.net.0.proj",
    "double_blocks.0.img_mlp.2": f"{DOUBLE}ff.net.2",
    "double_blocks.0.txt_mlp.0": f"{DOUBLE}ff_context.net.0.proj",
    "double_blocks.0.txt_mlp.2": f"{DOUBLE}ff_context.net.2",
    "double_blocks.0.img_mod.lin": f"{DOUBLE}norm1.linear",
    "double_blocks.0.txt_mod.lin": f"{DOUBLE}norm1_context.linear",
    "single_blocks.0.linear2": f"{SINGLE}proj_out",
    "single_blocks.0.modulation.lin": f"{SINGLE}norm.linear",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "time_in.in_layer": f"{TIME}timestep_embedder.linear_1",
    "time_in.out_layer": f"{TIME}timestep_embedder.linear_2",
    "vector_in.in_layer": f"{TIME}text_embedder.linear_1",
    "vector_in.out_layer": f"{TIME}text_embedder.linear_2",
    "guidance_in.in_layer": f"{TIME}guidance_embedder.linear_1",
    "guidance_in.out_layer": f"{TIME}guidance_embedder.linear_2",
}
SCALES = {
    "double_blocks.0.img_attn.norm.query_norm.scale": f"{DOUBLE}attn.norm_q.weight",
    "double_blocks.0.img_attn.norm.key_norm.scale": f"{DOUBLE}attn.norm_k.weight",
    "double_blocks.0.txt_attn.norm.query_norm.scale": f"{DOUBLE}attn.norm_added_q.weight",
    "double_blocks.0.txt_attn.norm.key_norm.scale": f"{DOUBLE}attn.norm_added_k.weight",
    "single_blocks.0.norm.query_norm.scale": f"{SINGLE}attn.norm_q.weight",
    "single_blocks.0.norm.key_norm.scale": f"{SINGLE}attn.norm_k.weight",
}
LAST = "final_layer.adaLN_modulation.1", "norm_out.linear"  # shift and scale change places
PARTS = ("weight", "bias")


def _to_bfl(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {new: state[old] for new, old in SCALES.items()}
    for part in PARTS:
        tensors |= {f"{new}.{part}": state[f"{old}.{part}"] for new, old in SAME.items()}
        tensors |= {f"{new}.{part}": torch.cat([state[f"{x}.{part}"] for x in olds]) for new, olds in FUSED.items()}
        tensors[f"{LAST[0]}.{part}"] = torch.cat(state[f"{LAST[1]}.{part}"].chunk(2)[::-1])
    return tensors


def _from_bfl(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {old: tensors[new] for new, old in SCALES.items()}
    for part in PARTS:
        state |= {f"{old}.{part}": tensors[f"{new}.{part}"] for new, old in SAME.items()}
        for new, olds in FUSED.items():
            whole = tensors[f"{new}.{part}"]
            height = tensors[f"{new.split('.')[0]}.0.{'img_attn.proj' if 'double' in new else 'linear2'}.weight"].shape[
                0
            ]
            sizes = [height] * 3 + [len(whole) - 3 * height] * (len(olds) - 3)
            state |= {f"{old}.{part}": rows for old, rows in zip(olds, whole.split(sizes), strict=True)}
        state[f"{LAST[1]}.{part}"] = torch.cat(tensors[f"{LAST[0]}.{part}"].chunk(2)[::-1])
    return state
