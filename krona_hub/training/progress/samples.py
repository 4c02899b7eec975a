"""Pictures of the adapter on its way: fixed prompts and seeds every so many steps, and the grid of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from krona_hub.checkpoints.atomic import atomic_file
from krona_hub.training.model.model_families import ModelFamily
from krona_hub.training.progress.metrics import FOLDER, GRID, sample_files
from krona_hub.training.randomness import generator
from krona_hub.training.settings import TrainingSettings

NAMES = {"text": "prompt_embeds", "pooled": "pooled_prompt_embeds"}  # condition -> argument of the pipeline
Told = Mapping[str, Tensor]


def encode_prompts(
    pipe: Any, family: ModelFamily, prompts: Sequence[str], device: torch.device
) -> tuple[list[Told], Told]:
    """Conditions of each prompt, and of none: encoded before the text encoders go."""
    with torch.no_grad():
        empty = family.encode(pipe, [""], device)
        if getattr(pipe.config, "force_zeros_for_empty_prompt", False):  # what SDXL is guided away from
            empty = {name: torch.zeros_like(tensor) for name, tensor in empty.items()}
        return [family.encode(pipe, [p], device) for p in prompts], empty


class Drawing(NamedTuple):
    """How a picture is drawn."""

    size: int  # of its sides, pixels
    steps: int  # of denoising
    guidance: float


def draw_samples(
    pipe: Any, told: tuple[list[Told], Told], settings: TrainingSettings, device: torch.device, size: int
) -> list[Image.Image]:
    """A picture of each prompt, at every call from the same seeds."""
    how = Drawing(size, settings.sample_steps, settings.sample_guidance)
    with undisturbed(pipe, device):
        seeds = (generator(settings.seed, "sample", number) for number in range(len(told[0])))
        return [drawn(pipe, given, told[1], how, seed) for given, seed in zip(told[0], seeds, strict=True)]


def drawn(pipe: Any, given: Told, empty: Told, how: Drawing, seed: torch.Generator) -> Image.Image:
    """One picture, of conditions."""
    arguments = {NAMES[name]: tensor for name, tensor in given.items()}
    if type(pipe).__name__ != "FluxPipeline":  # which has no negative prompt
        arguments |= {f"negative_{NAMES[name]}": tensor for name, tensor in empty.items()}
    image: Image.Image = pipe(
        **arguments, num_inference_steps=how.steps, guidance_scale=how.guidance, height=how.size, width=how.size,
        generator=seed,
    ).images[0]  # fmt: skip
    return image


@contextmanager
def undisturbed(pipe: Any, device: torch.device) -> Iterator[None]:
    """The autoencoder comes to the device for the block, and takes what is in the denoiser's type; scheduler and random
    numbers are afterwards as before.
    """
    states, scheduler, vae = torch.get_rng_state(), pipe.scheduler, pipe.vae
    place, decode = vae.device, vae.decode
    vae.to(device)
    vae.decode = lambda latents, *more, **named: decode(latents.to(vae.dtype), *more, **named)
    try:
        with torch.no_grad():
            yield
    finally:
        del vae.decode
        vae.to(place)
        pipe.scheduler = type(scheduler).from_config(scheduler.config)
        torch.set_rng_state(states)


def save_samples(run: Path, step: int, images: Sequence[Image.Image]) -> None:
    """One file per prompt, and the grid anew: a row per step, a column per prompt."""
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        save_picture(image, folder / f"step-{step:07d}-{number}.png")
    save_picture(grid(run), folder / GRID)


def grid(run: Path) -> Image.Image:
    """All samples so far in one picture, white between them."""
    rows = [[Image.open(path) for path in paths] for paths in sample_files(run).values()]
    width, height = rows[0][0].size
    columns, gap = max(map(len, rows)), 4
    whole = Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            whole.paste(image, (x * (width + gap), y * (height + gap)))
    return whole


def forget_samples(run: Path, step: int) -> None:
    """Delete those behind a step: a resumed run draws them again."""
    for number, paths in sample_files(run).items():
        if number > step:
            for path in paths:
                path.unlink()


def save_picture(image: Image.Image, path: Path) -> None:
    """As PNG, whole or not at all."""
    with atomic_file(path, overwrite=True) as file:
        image.save(file, "PNG")
