"""Train the base model that ships in the package from scratch: `python scripts/make_tiny_base.py --work DIR`.

Renders the images, trains the autoencoder, refines its decoder, trains U-Net and text encoder together, measures the
result on held-out prompts and writes a diffusers folder in half precision. The shipped model took 11,200 seconds of CPU
time: about 100 minutes on two cores. The training is seeded. All state is in `--work`: after an interruption, the same
command resumes. `--threads` does not change the recipe.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from scripts.tiny_scenes import autoencoder, card, denoiser, images, models, sampling  # noqa: E402
from scripts.tiny_scenes.scene import prompt  # noqa: E402
from scripts.tiny_scenes.training import Recipe  # noqa: E402

OUT = ROOT / "krona_hub" / "assets" / "tiny-scenes"
CHECK_EVERY, CHECKED = 500, 48  # steps; held-out prompts
GRID = 32  # images in the grid of the model card


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    first = replace(autoencoder.RECIPE, steps=args.autoencoder_steps)
    second = replace(denoiser.RECIPE, steps=args.denoiser_steps)
    data = rendered(args.work, args.pictures, args.threads)
    vae = trained_autoencoder(args.work, data, first)
    latents = encoded(args.work, vae, data)
    refine_decoder(args.work, vae, data, latents, replace(autoencoder.REFINEMENT, steps=args.decoder_steps))
    pipe = trained_pipeline(args.work, vae, scaled(vae, latents), second)
    save(pipe, args.out, args.work)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="Folder for rendered images and checkpoints.")
    parser.add_argument("--out", type=Path, default=OUT, help="Diffusers folder to write.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=12000)
    parser.add_argument("--autoencoder-steps", type=int, default=autoencoder.RECIPE.steps)
    parser.add_argument("--decoder-steps", type=int, default=autoencoder.REFINEMENT.steps)
    parser.add_argument("--denoiser-steps", type=int, default=denoiser.RECIPE.steps)
    return parser.parse_args()


def rendered(work: Path, count: int, workers: int) -> NDArray[np.uint8]:
    for done in images.prepare(work / "pictures", count, workers):
        log(f"images {done}/{count}")
    return images.load(work / "pictures", count)


def trained_autoencoder(work: Path, data: NDArray[np.uint8], recipe: Recipe) -> models.AutoencoderKL:
    vae = models.autoencoder()
    for run in autoencoder.train(work, data, recipe):
        log(f"autoencoder {run.step}/{run.recipe.steps}", every=run.step % 100 == 0)
    vae.load_state_dict(torch.load(work / "autoencoder.pt", weights_only=True)["averaged"])
    return vae.to(memory_format=torch.channels_last).eval()


def encoded(work: Path, vae: models.AutoencoderKL, data: NDArray[np.uint8]) -> Tensor:
    """Return the latents of all images, (n, 8, 8, 8), as encoded."""
    path = work / f"latents-{len(data)}.pt"
    if not path.exists():
        torch.save(autoencoder.encode(vae, data), path)
    latents: Tensor = torch.load(path, weights_only=True)
    return latents


def refine_decoder(
    work: Path, vae: models.AutoencoderKL, data: NDArray[np.uint8], latents: Tensor, recipe: Recipe
) -> None:
    """Train the decoder further and load the result into `vae`."""
    for run in autoencoder.refine(work, vae, data, latents, recipe):
        log(f"decoder {run.step}/{run.recipe.steps}", every=run.step % 100 == 0)
    state = torch.load(work / "decoder.pt", weights_only=True)["averaged"]
    vae.load_state_dict(state, strict=False)
    vae.eval().requires_grad_(False)


def scaled(vae: models.AutoencoderKL, latents: Tensor) -> Tensor:
    """Scale the latents to unit standard deviation and store the factor in the configuration of the autoencoder."""
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
    return latents * vae.config.scaling_factor


def trained_pipeline(
    work: Path, vae: models.AutoencoderKL, latents: Tensor, recipe: Recipe
) -> models.StableDiffusionPipeline:
    words = models.tokenizer(work / "tokenizer")
    net, text = models.unet(), models.text_encoder()
    pipe = models.pipeline(vae, net, text, words)
    for run in denoiser.train(work, latents, images.training_scenes(len(latents)), recipe):
        log(f"denoiser {run.step}/{run.recipe.steps}", every=run.step % 100 == 0)
        if run.step % CHECK_EVERY == 0:
            load_averaged(pipe, run.averaged.state_dict())
            run.note(check=sampling.measure(pipe, CHECKED)._asdict())
    load_averaged(pipe, torch.load(work / "denoiser.pt", weights_only=True)["averaged"])
    return pipe


def load_averaged(pipe: models.StableDiffusionPipeline, averaged: dict[str, Tensor]) -> None:
    """Load the averaged weights of both models into the pipeline."""
    for name, model in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder)):
        model.load_state_dict({k.removeprefix(f"{name}."): v for k, v in averaged.items() if k.startswith(f"{name}.")})


def save(pipe: models.StableDiffusionPipeline, out: Path, work: Path) -> None:
    """Write half precision to `out`, load it again and measure it."""
    models.save(pipe, out)
    written = models.StableDiffusionPipeline.from_pretrained(out)
    quality = sampling.measure(written)
    shown = sampling.generate(written, [prompt(scene) for scene in denoiser.held_out_scenes(GRID)])
    Image.fromarray(sampling.grid(shown, 8)).save(work / "grid.png")
    (work / "quality.json").write_text(json.dumps(quality._asdict()) + "\n")
    megabytes = sum(file.stat().st_size for file in out.rglob("*.safetensors")) / 1e6
    (out / "README.md").write_text(card.text(quality, f"{megabytes:.1f} MB"))
    log(f"{out}: {quality}")


def log(text: str, every: bool = True) -> None:
    if every:
        print(text, flush=True)


if __name__ == "__main__":
    main()
