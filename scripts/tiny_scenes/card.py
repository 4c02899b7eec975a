"""The model card, written from what was measured."""

from __future__ import annotations

from scripts.tiny_scenes import autoencoder, denoiser, models
from scripts.tiny_scenes.check import Score
from scripts.tiny_scenes.scene import COLOURS, LIGHTS, POSITIONS, SHAPES, SIZES, TABLES, WALLS

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [tiny, stable-diffusion, kronecker, lokr, lora]
---
# tiny-scenes

A complete Stable Diffusion pipeline of {size}, trained from nothing on pictures that the project renders itself. It
draws 64×64 pictures of one object on a table, in about a second each on a CPU, so that everything about adapters can
be run and seen offline. It knows nothing else, and is meant for nothing else.

    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained("tiny-scenes")  # this folder
    prompt = "a photo of a small red cube on a blue table, on the left"
    pipe(prompt, num_inference_steps={steps}, guidance_scale={guidance}).images[0]

## Prompts

    a photo of a [size] colour object [on a … table][, position][, … wall][, light from the left|right]

{words}

## Quality, measured

{count} prompts of combinations (object, colour, size, table) that no training picture shows; {steps} steps of DDIM,
guidance {guidance}, the n-th picture from seed n. A check that learned nothing (`scripts/tiny_scenes/check.py`: vivid
pixels, their hue and place, nearest rendered template) finds the right

| object | colour | position |
|---|---|---|
| {shape} | {colour} | {position} |

The check itself finds what is there on held-out renders, nothing in noise, and falls to chance on swapped captions: a
test shows it. Place is what the model learned last and least: guessing would be right in a third.

## Data and training

12 000 pictures by `scripts/tiny_scenes/render.py` (signed distance fields, numpy), with captions of a fixed grammar
that leave parts out at random. One in eight combinations is held out. The autoencoder (f = 8, {channels} channels) was
trained for {vae_steps} steps of {vae_batch} pictures on absolute error of pixels and edges, its decoder alone for
{decoder_steps} more of {decoder_batch}; U-Net and text encoder together for {unet_steps} steps of {unet_batch} on
velocity prediction (cosine schedule), captions dropped in {dropped} of the cases; moving average of weights.
`scripts/make_tiny_base.py` repeats everything, seeded, on a CPU.

Licence: Apache-2.0 for the model, CC0 for the pictures.
"""


def text(quality: Score, size: str) -> str:
    """The card of a model of this quality."""
    tables = {"object": SHAPES, "colour": COLOURS, "size": SIZES, "table": TABLES, "position": POSITIONS,
              "wall": WALLS, "light from the": LIGHTS}  # fmt: skip
    return CARD.format(
        size=size,
        steps=denoiser.STEPS,
        guidance=denoiser.GUIDANCE,
        words="\n".join(f"- {name}: {', '.join(words)}" for name, words in tables.items()),
        count=quality.count,
        shape=f"{quality.shape:.1%}",
        colour=f"{quality.colour:.1%}",
        position=f"{quality.position:.1%}",
        channels=models.CHANNELS,
        vae_steps=autoencoder.RECIPE.steps,
        vae_batch=autoencoder.RECIPE.batch,
        decoder_steps=autoencoder.REFINEMENT.steps,
        decoder_batch=autoencoder.REFINEMENT.batch,
        unet_steps=denoiser.RECIPE.steps,
        unet_batch=denoiser.RECIPE.batch,
        dropped=f"{denoiser.UNCONDITIONAL:.0%}",
    )
