"""Stage two: train U-Net and text encoder together on captioned latents that were encoded beforehand."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from scripts.tiny_scenes import tokens
from scripts.tiny_scenes.models import scheduler, text_encoder, unet
from scripts.tiny_scenes.scene import Scene, scenes, training_caption, vocabulary
from scripts.tiny_scenes.training import Loss, Recipe, Run

RECIPE = Recipe(steps=4500, batch=64, rate=1e-3, warmup=200, seed=1)
UNCONDITIONAL = 0.1  # share of captions that are dropped, for guidance
GUIDANCE, STEPS = 3.0, 20  # settings for generating images, in the check and by default
HELD_OUT_SEED = 2024


def train(folder: Path, latents: Tensor, rendered: Sequence[Scene], recipe: Recipe = RECIPE) -> Iterator[Run]:
    """Yield the run after every step; its `averaged` contains "unet" and "text_encoder".

    `latents` are those of the images of `rendered` scenes, scaled to unit standard deviation: (n, 8, 8, 8).
    """
    torch.manual_seed(recipe.seed)
    model = nn.ModuleDict({"unet": unet().to(memory_format=torch.channels_last), "text_encoder": text_encoder()})
    run = Run(model, recipe, folder / "denoiser.pt")
    for _ in run.train(denoising(latents, rendered, recipe.batch)):
        yield run


def denoising(latents: Tensor, rendered: Sequence[Scene], batch: int) -> Loss:
    """Return the loss on a random batch: squared error of the velocity at random timesteps."""
    noising, ids = scheduler(), Ids()

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator)
        times = torch.randint(noising.config.num_train_timesteps, (batch,), generator=generator)
        clean, noise = latents[rows], torch.randn(latents[rows].shape, generator=generator)
        context = model["text_encoder"](ids.of(sample_captions([rendered[row] for row in rows], generator)))[0]
        noisy = noising.add_noise(clean, noise, times).contiguous(memory_format=torch.channels_last)
        prediction = model["unet"](noisy, times, context).sample
        return nn.functional.mse_loss(prediction, noising.get_velocity(clean, noise, times))

    return loss


def sample_captions(rendered: Sequence[Scene], generator: torch.Generator) -> list[str]:
    """Sample a caption for each scene; some omit parts, and some are empty."""
    rng = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
    return ["" if rng.random() < UNCONDITIONAL else training_caption(scene, rng) for scene in rendered]


class Ids:
    """Token ids of captions, word by word: the ids of the tokenizer, many times faster (a test compares them)."""

    def __init__(self) -> None:
        self.known = tokens.vocabulary(vocabulary())

    def of(self, captions: Sequence[str]) -> Tensor:
        """Return (n, 32) ids with start and end tokens, padded with the end token."""
        start, end = self.known[tokens.START], self.known[tokens.END]
        rows = [[start, *(self.known[w + tokens.WORD_END] for w in re.findall(r"\w+|,", text))] for text in captions]
        return torch.tensor([row + [end] * (tokens.LENGTH - len(row)) for row in rows])


def held_out_scenes(count: int) -> list[Scene]:
    """Return scenes with combinations that are never trained on, for the prompts of the check."""
    return list(islice(scenes(HELD_OUT_SEED, held=True), count))
