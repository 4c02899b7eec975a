"""The four small components of the pipeline: classes of diffusers and transformers with their usual module names."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scripts.tiny_scenes import tokens
from scripts.tiny_scenes.scene import vocabulary

LATENT = 8  # side of the latents: 64 pixels / 8
CHANNELS = 8  # of the latents
TEXT_WIDTH = 128


def autoencoder() -> AutoencoderKL:
    """Return the autoencoder, 64×64×3 ↔ 8×8×8. With four channels, small objects stay blurred several times longer."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 24, 48, 96),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=CHANNELS,
        sample_size=64,
    )


def unet() -> UNet2DConditionModel:
    """Return the U-Net with two resolutions, 8×8 with cross-attention and 4×4."""
    return UNet2DConditionModel(
        sample_size=LATENT,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(80, 128),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,  # the number of heads, as in Stable Diffusion 1
        cross_attention_dim=TEXT_WIDTH,
    )


def text_encoder() -> CLIPTextModel:
    token_ids = tokens.vocabulary(vocabulary())
    config = CLIPTextConfig(
        vocab_size=len(token_ids),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokens.LENGTH,
        projection_dim=TEXT_WIDTH,
        hidden_act="quick_gelu",
        bos_token_id=token_ids[tokens.START],
        eos_token_id=token_ids[tokens.END],
        pad_token_id=token_ids[tokens.END],
    )
    return CLIPTextModel(config)


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Write the tokenizer to `folder` and load it from there, like every user of the folder."""
    tokens.save(folder, vocabulary())
    return CLIPTokenizer.from_pretrained(folder)


def scheduler() -> DDIMScheduler:
    """Return a scheduler for v-prediction on the cosine schedule, whose last step is almost pure noise."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=True,
        timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip


def pipeline(
    vae: AutoencoderKL, net: UNet2DConditionModel, text: CLIPTextModel, words: CLIPTokenizer
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=words, unet=net, scheduler=scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def save(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write a diffusers folder in half precision that loads in float32 by default.

    diffusers defaults to float32, but transformers uses the dtype in the configuration, and a pipeline with two dtypes
    fails.
    """
    pipe.to(dtype=torch.float16).save_pretrained(folder)
    tokens.save(folder / "tokenizer", vocabulary())
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
