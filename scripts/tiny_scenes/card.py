"""Write the model card of the base model from the measured quality."""

from __future__ import annotations

from scripts.tiny_scenes import autoencoder, denoiser, models
from scripts.tiny_scenes.check import Score
from scripts.tiny_scenes.scene import COLORS, LIGHTS, POSITIONS, SHAPES, SIZES, TABLES, WALLS

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [tiny, stable-diffusion, kronecker, lokr, lora]
---
# tiny-scenes

A complete Stable Diffusion pipeline of {size}, trained from scratch on images that the project renders itself. It
generates 64×64 images of one object on a table, in about a second each on a CPU, so that everything about adapters can
be tried offline. It knows nothing else and has no other purpose.

    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained("tiny-scenes")  # this folder
    prompt = "a photo of a small red cube on a blue table, on the left"
    pipe(prompt, num_inference_steps={steps}, guidance_scale={guidance}).images[0]

## Prompts

    a photo of a [size] color object [on a … table][, position][, … wall][, light from the left|right]

{words}

## Measured quality

Measured on {count} prompts with combinations of object, color, size and table that no training image shows, with
{steps} steps of DDIM, guidance {guidance}, and seed n for the n-th image. A check without a learned model
(`scripts/tiny_scenes/check.py`: vivid pixels, their hue and position, nearest rendered template) finds the right

| object | color | position |
|---|---|---|
| {shape} | {color} | {position} |

A test shows that the check recognizes held-out renders, finds nothing in noise, and falls to chance on swapped
captions. The position is what the model learned last and least; guessing would be right in a third of the images.

## Data and training

The training data are 12,000 images rendered by `scripts/tiny_scenes/render.py` (signed distance fields, numpy), with
captions of a fixed grammar that omit parts at random. One in eight combinations is held out. The autoencoder (f = 8,
{channels} channels) was trained for {vae_steps} steps of {vae_batch} images on the absolute error of pixels and edges,
and its decoder alone for {decoder_steps} more steps of {decoder_batch}. U-Net and text encoder were trained together
for {unet_steps} steps of {unet_batch} on velocity prediction (cosine schedule), with {dropped} of the captions dropped
and a moving average of the weights. `scripts/make_tiny_base.py` repeats the whole training, seeded, on a CPU.

License: Apache-2.0 for the model, CC0 for the images.
"""


def text(quality: Score, size: str) -> str:
    """Return the model card for a measured quality and a size."""
    tables = {"object": SHAPES, "color": COLORS, "size": SIZES, "table": TABLES, "position": POSITIONS,
              "wall": WALLS, "light from the": LIGHTS}  # fmt: skip
    return CARD.format(
        size=size,
        steps=denoiser.STEPS,
        guidance=denoiser.GUIDANCE,
        words="\n".join(f"- {name}: {', '.join(words)}" for name, words in tables.items()),
        count=quality.count,
        shape=f"{quality.shape:.1%}",
        color=f"{quality.color:.1%}",
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
