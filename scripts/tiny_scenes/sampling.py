"""Generate images with fixed seeds from a pipeline, and measure how well they match their prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from scripts.tiny_scenes.check import Score, score
from scripts.tiny_scenes.denoiser import GUIDANCE, STEPS, held_out_scenes
from scripts.tiny_scenes.render import Image
from scripts.tiny_scenes.scene import prompt

BATCH = 25  # images at a time


@torch.no_grad()
def generate(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], guidance: float = GUIDANCE, steps: int = STEPS
) -> list[Image]:
    """Generate one image per prompt; the n-th starts from noise of seed n."""
    pipe.set_progress_bar_config(disable=True)
    images: list[Image] = []
    for start in range(0, len(prompts), BATCH):
        batch = list(prompts[start : start + BATCH])
        seeds = [torch.Generator().manual_seed(start + n) for n in range(len(batch))]
        output = pipe(
            batch, guidance_scale=guidance, num_inference_steps=steps, generator=seeds, output_type="np"
        ).images
        images += list(np.rint(output * 255).astype(np.uint8))
    return images


def measure(pipe: StableDiffusionPipeline, count: int = 200) -> Score:
    """Score images of held-out prompts."""
    held_out = held_out_scenes(count)
    return score(generate(pipe, [prompt(scene) for scene in held_out]), held_out)


def grid(images: Sequence[Image], columns: int) -> Image:
    """Arrange images in a grid, row by row."""
    rows = [np.concatenate(images[n : n + columns], axis=1) for n in range(0, len(images), columns)]
    return np.concatenate(rows)
