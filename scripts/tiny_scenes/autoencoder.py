"""Stage one: train the autoencoder to reconstruct images from 8×8×8 latents; then encode every image once.

After that, only the decoder is trained further: the latents, on which the denoiser is trained, stay fixed.
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
JITTER = 0.05  # noise relative to the standard deviation of the latents: makes the decoder robust to denoising errors
DIVERGENCE = 2e-4  # weight of the KL divergence from a unit normal, per latent element
EDGES = 1.0  # weight of the error of differences between neighboring pixels, for sharp edges
VIVID = 3.0  # extra weight of a fully saturated pixel: the object is small but most important


def train(folder: Path, images: NDArray[np.uint8], recipe: Recipe = RECIPE) -> Iterator[Run]:
    """Yield the run after every step; its `averaged` is the trained model."""
    torch.manual_seed(recipe.seed)
    run = Run(autoencoder().to(memory_format=torch.channels_last), recipe, folder / "autoencoder.pt")
    for _ in run.train(reconstruction(images, recipe.batch)):
        yield run


def refine(
    folder: Path, model: AutoencoderKL, images: NDArray[np.uint8], latents: Tensor, recipe: Recipe = REFINEMENT
) -> Iterator[Run]:
    """Train the decoder of a trained autoencoder further, on its unscaled latents (n, 8, 8, 8) of the images."""
    decoder = nn.ModuleDict({"post_quant_conv": model.post_quant_conv, "decoder": model.decoder})
    run = Run(decoder.requires_grad_(True), recipe, folder / "decoder.pt")
    for _ in run.train(decoding(images, latents, recipe.batch)):
        yield run


def decoding(images: NDArray[np.uint8], latents: Tensor, batch: int) -> Loss:
    """Return the loss on images decoded from slightly noisy latents, with the same error as `reconstruction`."""
    jitter = JITTER * float(latents.std())

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        target = as_input(images[rows.numpy()])
        noise = jitter * torch.randn((batch, *latents.shape[1:]), generator=generator)
        z = (latents[rows] + noise).contiguous(memory_format=torch.channels_last)
        decoded = model["decoder"](model["post_quant_conv"](z))
        return _difference(decoded, target, 1 + VIVID * _saturation(target))

    return loss


def reconstruction(images: NDArray[np.uint8], batch: int) -> Loss:
    """Return the loss on a random batch: absolute error of pixels and edges, weighted toward vivid pixels."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (batch,), generator=generator)
        target = as_input(images[rows.numpy()])
        posterior = model.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
        weight = 1 + VIVID * _saturation(target)
        return _difference(decoded, target, weight) + DIVERGENCE * posterior.kl().mean() / posterior.mean[0].numel()

    return loss


def _difference(decoded: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    error = decoded - target
    pixels = (weight * error.abs()).mean()
    across, down = error.diff(dim=3).abs(), error.diff(dim=2).abs()
    return pixels + EDGES * ((weight[..., 1:] * across).mean() + (weight[:, :, 1:] * down).mean())


def _saturation(x: Tensor) -> Tensor:
    """Return the saturation, (n, 1, h, w) in 0 … 1, of images in -1 … 1."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    return (high - low) / (high + 1).clamp_min(0.05)


def as_input(images: NDArray[np.uint8]) -> Tensor:
    """Convert bytes (n, 64, 64, 3) to (n, 3, 64, 64) in -1 … 1."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def encode(model: AutoencoderKL, images: NDArray[np.uint8]) -> Tensor:
    """Return the means of the latents, unscaled: (n, 8, 8, 8)."""
    return torch.cat(
        [model.encode(as_input(some)).latent_dist.mean for some in np.array_split(images, max(1, len(images) // 64))]
    )
