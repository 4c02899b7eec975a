"""Complete tiny pipelines, with tokenizers and autoencoders, saved as diffusers folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tests import tiny

LENGTH = 16  # tokens


def clip_tokenizer(folder: Path):
    """A CLIP tokenizer with a token per letter, and two tokens for start and end."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {mark: i for i, mark in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    vocabulary |= {"<|startoftext|>": 62, "<|endoftext|>": 63}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    about = {
        "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return CLIPTokenizer.from_pretrained(folder)


def t5(width: int = 24):
    """A T5 encoder and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "photo": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(7)
    config = T5Config(vocab_size=8, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval(), tokenizer


def _flux():
    """One double and one single block over 2×2 patches of four channels."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(7)
    return FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=24, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip


def _sd3():
    """An SD3 transformer as wide as both CLIP encoders together."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(7)
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=16,
    )  # fmt: skip


def _autoencoder():
    """An autoencoder with eight pixels per latent along each side, as in real models, for photographs."""
    from diffusers import AutoencoderKL

    torch.manual_seed(7)
    return AutoencoderKL(
        block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=2, sample_size=64,
    )  # fmt: skip


def save_base(kind: str, folder: Path) -> Path:
    """Save a complete pipeline; `photographs` is sd15 with an autoencoder of the usual downsampling."""
    pipe = getattr(tiny, "sd15" if kind == "photographs" else kind)()
    more = {"tokenizer": clip_tokenizer(folder / "words")}
    if kind == "photographs":
        more["vae"] = _autoencoder()
    if kind in ("sd3", "flux"):
        pipe.vae.register_to_config(shift_factor=0.1)  # as in the real models; their pipelines require it
    if kind in ("sdxl", "sd3"):
        more["tokenizer_2"] = more["tokenizer"]
    if kind == "sd3":
        more["text_encoder_3"], more["tokenizer_3"] = t5(48)
        more["transformer"] = _sd3()
    if kind == "flux":
        more["text_encoder_2"], more["tokenizer_2"] = t5()
        more["transformer"] = _flux()
    type(pipe)(**{**pipe.components, **more}).save_pretrained(folder / kind)
    return folder / kind


def save_photos(folder: Path) -> Path:
    """Save five images of four aspect ratios."""
    folder.mkdir()
    random = np.random.default_rng(5)
    for number, size in enumerate([(40, 40), (40, 40), (60, 36), (36, 60), (44, 40)]):
        pixels = random.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder
