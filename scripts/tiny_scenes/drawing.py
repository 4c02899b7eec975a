"""Pictures from a pipeline, prompt by prompt with fixed seeds, and how well they show what was asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from scripts.tiny_scenes.check import Score, score
from scripts.tiny_scenes.denoiser import GUIDANCE, STEPS, held_out_scenes
from scripts.tiny_scenes.render import Image
from scripts.tiny_scenes.scene import prompt

BATCH = 25  # pictures at a time


@torch.no_grad()
def draw(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], guidance: float = GUIDANCE, steps: int = STEPS
) -> list[Image]:
    """One picture for each prompt; the n-th starts from noise of seed n."""
    pipe.set_progress_bar_config(disable=True)
    pictures: list[Image] = []
    for start in range(0, len(prompts), BATCH):
        some = list(prompts[start : start + BATCH])
        seeds = [torch.Generator().manual_seed(start + n) for n in range(len(some))]
        drawn = pipe(some, guidance_scale=guidance, num_inference_steps=steps, generator=seeds, output_type="np").images
        pictures += list(np.rint(drawn * 255).astype(np.uint8))
    return pictures


def measure(pipe: StableDiffusionPipeline, count: int = 200) -> Score:
    """The check on pictures of held-out prompts."""
    wanted = held_out_scenes(count)
    return score(draw(pipe, [prompt(scene) for scene in wanted]), wanted)


def grid(pictures: Sequence[Image], columns: int) -> Image:
    """Pictures side by side, row by row."""
    rows = [np.concatenate(pictures[n : n + columns], axis=1) for n in range(0, len(pictures), columns)]
    return np.concatenate(rows)
