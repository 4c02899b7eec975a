"""Sample images during training, with fixed prompts and seeds at regular steps, and the grid of all samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from krona_hub.checkpoints.atomic import atomic_file
from krona_hub.pipelines.randomness import generator
from krona_hub.training.model.model_families import Conditions, ModelFamily
from krona_hub.training.progress.metrics import FOLDER, GRID, sample_files
from krona_hub.training.settings import TrainingSettings

NAMES = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds"}  # condition -> argument of the pipeline


def encode_prompts(
    pipe: Any, family: ModelFamily, prompts: Sequence[str], device: torch.device
) -> tuple[list[Conditions], Conditions]:
    """Encode each prompt, and the empty prompt, before the text encoders are freed."""
    with torch.no_grad():
        empty = family.encode(pipe, [""], device)
        if getattr(pipe.config, "force_zeros_for_empty_prompt", False):  # negative prompt of SDXL
            empty = {name: torch.zeros_like(tensor) for name, tensor in empty.items()}
        return [family.encode(pipe, [p], device) for p in prompts], empty


class SamplingOptions(NamedTuple):
    """Options for generating an image."""

    size: int  # pixels of each side
    steps: int  # denoising steps
    guidance: float


def generate_samples(
    pipe: Any,
    conditions: tuple[list[Conditions], Conditions],
    settings: TrainingSettings,
    device: torch.device,
    size: int,
) -> list[Image.Image]:
    """Generate an image for each prompt, with the same seeds at every call."""
    prompts, empty = conditions
    options = SamplingOptions(size, settings.sample_steps, settings.sample_guidance)
    with preserved_state(pipe, device):
        seeds = (generator(settings.seed, "sample", number) for number in range(len(prompts)))
        return [generate_image(pipe, given, empty, options, seed) for given, seed in zip(prompts, seeds, strict=True)]


def generate_image(
    pipe: Any, given: Conditions, empty: Conditions, options: SamplingOptions, seed: torch.Generator
) -> Image.Image:
    """Generate one image from encoded prompts."""
    arguments = {NAMES[name]: tensor for name, tensor in given.items()}
    if type(pipe).__name__ != "FluxPipeline":  # FLUX takes no negative prompt
        arguments |= {f"negative_{NAMES[name]}": tensor for name, tensor in empty.items()}
    image: Image.Image = pipe(
        **arguments, num_inference_steps=options.steps, guidance_scale=options.guidance, height=options.size,
        width=options.size, generator=seed,
    ).images[0]  # fmt: skip
    return image


@contextmanager
def preserved_state(pipe: Any, device: torch.device) -> Iterator[None]:
    """Prepare the pipeline for generating images, and restore its scheduler and the random state afterwards.

    Within the block, the autoencoder is on the device and accepts latents in the data type of the denoiser.
    """
    states, scheduler, vae = torch.get_rng_state(), pipe.scheduler, pipe.vae
    vae_device, decode = vae.device, vae.decode
    vae.to(device)
    vae.decode = lambda latents, *more, **named: decode(latents.to(vae.dtype), *more, **named)
    try:
        with torch.no_grad():
            yield
    finally:
        del vae.decode
        vae.to(vae_device)
        pipe.scheduler = type(scheduler).from_config(scheduler.config)
        torch.set_rng_state(states)


def save_samples(run: Path, step: int, images: Sequence[Image.Image]) -> None:
    """Save one file per prompt, and update the grid: a row per step, a column per prompt."""
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        save_image(image, folder / f"step-{step:07d}-{number}.png")
    save_image(grid(run), folder / GRID)


def grid(run: Path) -> Image.Image:
    """Return all samples so far in one image, separated by white gaps."""
    rows = [[Image.open(path) for path in paths] for paths in sample_files(run).values()]
    width, height = rows[0][0].size
    columns, gap = max(map(len, rows)), 4
    combined = Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            combined.paste(image, (x * (width + gap), y * (height + gap)))
    return combined


def forget_samples(run: Path, step: int) -> None:
    """Delete the samples after a step, because a resumed run generates them again."""
    for number, paths in sample_files(run).items():
        if number > step:
            for path in paths:
                path.unlink()


def save_image(image: Image.Image, path: Path) -> None:
    """Save a PNG atomically."""
    with atomic_file(path, overwrite=True) as file:
        image.save(file, "PNG")
