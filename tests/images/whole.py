"""Tiny pipelines that are whole: with tokenizers, so that they draw from a prompt. Random weights, a few pixels."""

from __future__ import annotations

import re

import torch
from safetensors.torch import load_file, save_file

from tests import tiny

WORDS = {"<|startoftext|>": 62, "<|endoftext|>": 63}


def _clip_tokenizer():
    """Letters are its words; ids above are those that the tiny text encoders look for."""
    from transformers import CLIPTokenizer

    letters = [c + end for end in ("", "</w>") for c in "abcdefghijklmnopqrstuvwxyz01234"]
    vocabulary = {letter: n for n, letter in enumerate(letters[:62])} | WORDS
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def sd15():
    pipe = tiny.sd15()
    pipe.tokenizer = _clip_tokenizer()
    return _named(pipe, "tokenizer")


def sdxl():
    pipe = tiny.sdxl()
    pipe.tokenizer, pipe.tokenizer_2 = _clip_tokenizer(), _clip_tokenizer()
    return _named(pipe, "tokenizer", "tokenizer_2")


def _t5():
    """A T5 as wide as the tiny transformers expect, and its tokenizer."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    vocabulary += [(c, -2.0) for c in "abcdefghijklmnopqrstuvwxyz"]
    torch.manual_seed(3)
    config = T5Config(vocab_size=40, d_model=24, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval(), T5Tokenizer(vocab=vocabulary, extra_ids=0)


def _vae(channels: int):
    """An autoencoder with the shift of those that came with flow matching."""
    from diffusers import AutoencoderKL

    torch.manual_seed(4)
    return AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=channels, norm_num_groups=4, sample_size=16, shift_factor=0.1,
    ).eval()  # fmt: skip


def flux():
    pipe = tiny.flux()
    encoder, tokenizer = _t5()
    pipe.register_modules(vae=_vae(1), tokenizer=_clip_tokenizer(), text_encoder_2=encoder, tokenizer_2=tokenizer)
    return pipe


def sd3():
    pipe = tiny.sd3()
    encoder, tokenizer = _t5()
    pipe.register_modules(vae=_vae(4), tokenizer=_clip_tokenizer(), tokenizer_2=_clip_tokenizer())
    pipe.register_modules(text_encoder_3=encoder, tokenizer_3=tokenizer)
    for clip in (pipe.text_encoder, pipe.text_encoder_2):  # both projections together are as wide as the pooled input
        clip.config.projection_dim = 12
        clip.text_projection = torch.nn.Linear(24, 12, bias=False)
    return pipe


def _named(pipe, *names):
    """So that model_index.json names them."""
    pipe.register_modules(**{name: getattr(pipe, name) for name in names})
    return pipe


LDM_VAE = (  # diffusers' names in an autoencoder of one block, and those of its authors
    (r"\.(down|up)_blocks\.0\.resnets\.", r".\1.0.block."), (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"), (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_(.)", r"mid.attn_1.\1"), ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
)  # fmt: skip


def with_ldm_vae(path, vae) -> None:
    """Write the autoencoder into a checkpoint under its authors' names."""
    tensors = {k: v for k, v in load_file(path).items() if not k.startswith("first_stage_model.")}
    for name, tensor in vae.state_dict().items():
        for pattern, new in LDM_VAE:
            name = re.sub(pattern, new, name)
        square = "attn_1" in name and tensor.dim() == 2
        tensors[f"first_stage_model.{name}"] = tensor[..., None, None].clone() if square else tensor
    save_file(tensors, path, {"format": "pt"})
