"""Stage one: the autoencoder learns to draw pictures from 8×8×8 numbers; then every picture is encoded once.

From then on only the decoder learns: the latents, which the denoiser learns from, stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

from scripts.tiny_scenes.models import autoencoder
from scripts.tiny_scenes.training import Loss, Recipe, Run

RECIPE = Recipe(steps=5500, batch=8, rate=2e-3, average=0.995)
REFINEMENT = Recipe(steps=4500, batch=16, rate=1e-3, average=0.998, seed=2)
JITTER = 0.05  # of the latents' deviation: what a denoiser gets wrong, the decoder forgives
DIVERGENCE = 2e-4  # weight of the divergence from a unit normal, per latent number
EDGES = 1.0  # weight of the error of neighbouring pixels' differences: sharp outlines
VIVID = 3.0  # how much more a fully saturated pixel counts: the object is small, and what matters


def train(folder: Path, pictures: NDArray[np.uint8], recipe: Recipe = RECIPE) -> Iterator[Run]:
    """Yields the run after every step; its `averaged` is the trained model."""
    torch.manual_seed(recipe.seed)
    run = Run(autoencoder().to(memory_format=torch.channels_last), recipe, folder / "autoencoder.pt")
    for _ in run.train(reconstruction(pictures, recipe.batch)):
        yield run


def refine(
    folder: Path, model: AutoencoderKL, pictures: NDArray[np.uint8], latents: Tensor, recipe: Recipe = REFINEMENT
) -> Iterator[Run]:
    """Trains the decoder of a trained autoencoder further, on its unscaled latents (n, 8, 8, 8) of the pictures."""
    decoder = nn.ModuleDict({"post_quant_conv": model.post_quant_conv, "decoder": model.decoder})
    run = Run(decoder.requires_grad_(True), recipe, folder / "decoder.pt")
    for _ in run.train(redrawing(pictures, latents, recipe.batch)):
        yield run


def redrawing(pictures: NDArray[np.uint8], latents: Tensor, batch: int) -> Loss:
    """The same error as `reconstruction`, of pictures drawn from latents with a little noise."""
    jitter = JITTER * float(latents.std())

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pictures), (batch,), generator=generator)
        wanted = as_input(pictures[rows.numpy()])
        noise = jitter * torch.randn((batch, *latents.shape[1:]), generator=generator)
        z = (latents[rows] + noise).contiguous(memory_format=torch.channels_last)
        drawn = model["decoder"](model["post_quant_conv"](z))
        return _difference(drawn, wanted, 1 + VIVID * _saturation(wanted))

    return loss


def reconstruction(pictures: NDArray[np.uint8], batch: int) -> Loss:
    """The loss on a random batch: absolute error of pixels and of edges, vivid pixels first."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(pictures), (batch,), generator=generator)
        wanted = as_input(pictures[rows.numpy()])
        posterior = model.encode(wanted).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        drawn = model.decode(posterior.mean + posterior.std * noise).sample
        weight = 1 + VIVID * _saturation(wanted)
        return _difference(drawn, wanted, weight) + DIVERGENCE * posterior.kl().mean() / posterior.mean[0].numel()

    return loss


def _difference(drawn: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    error = drawn - wanted
    pixels = (weight * error.abs()).mean()
    across, down = error.diff(dim=3).abs(), error.diff(dim=2).abs()
    return pixels + EDGES * ((weight[..., 1:] * across).mean() + (weight[:, :, 1:] * down).mean())


def _saturation(x: Tensor) -> Tensor:
    """(n, 1, h, w) in 0 … 1, of pictures in -1 … 1."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    return (high - low) / (high + 1).clamp_min(0.05)


def as_input(pictures: NDArray[np.uint8]) -> Tensor:
    """Bytes (n, 64, 64, 3) → (n, 3, 64, 64) in -1 … 1."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def encode(model: AutoencoderKL, pictures: NDArray[np.uint8]) -> Tensor:
    """The latents' means, unscaled: (n, 8, 8, 8)."""
    return torch.cat(
        [
            model.encode(as_input(some)).latent_dist.mean
            for some in np.array_split(pictures, max(1, len(pictures) // 64))
        ]
    )
