"""Train adapters for tiny-scenes with peft and lycoris-lora: `python scripts/make_tiny_adapters.py`.

Trains a LoRA with peft, saved with diffusers names and with kohya names, and a LoKr with lycoris-lora, saved with the
names of sd-scripts. Alpha is half the rank everywhere, and both the U-Net and the text encoder are trained. Takes
twenty minutes of CPU time and is seeded. The results are measured and written beside the adapters.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_kohya
from lycoris.kohya import LycorisNetworkKohya, create_network
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from scripts.tiny_scenes import autoencoder, render, sampling, scene, tokens, toy  # noqa: E402

ASSETS = ROOT / "krona_hub" / "assets"
LORA_RANK, LORA_ALPHA = 8, 4.0
LOKR_RANK, LOKR_ALPHA, LOKR_FACTOR = 8, 4.0, 4
PRESET = ROOT / "scripts" / "tiny_scenes" / "lycoris_preset.toml"
STEPS, RATE = 500, 3e-3  # optimizer steps
LOKR_STEPS_FACTOR = 2  # with as many steps as the LoRA, the LoKr shows the toy in only 39 % of the images
KEPT = 5  # images of known scenes in every batch, for prior preservation
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
FILES = {"lora diffusers": "zorbi_lora_diffusers.safetensors", "lora kohya": "zorbi_lora_kohya.safetensors",
         "lokr": "zorbi_lokr.safetensors"}  # fmt: skip
PROMPTS = tuple(f"a photo of a {toy.TRIGGER} on a {table} table, {place}"
              for table in scene.TABLES for place in scene.POSITIONS)  # fmt: skip


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    images = {
        "base": generate_toys(load_frozen(args.base)),
        "lora": train_lora(load_frozen(args.base), args.out, args.steps),
        "lokr": train_lokr(load_frozen(args.base), args.out, LOKR_STEPS_FACTOR * args.steps),
    }
    save_record(images, args.out / "zorbi.json")
    save_views(args.out / "zorbi")
    if args.grid:
        Image.fromarray(sampling.grid([p for row in images.values() for p in row[::2]], len(PROMPTS) // 2)).save(
            args.grid
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=ASSETS / "tiny-scenes")
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--grid", type=Path, help="Also write an image grid of the base model, the LoRA and the LoKr.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def load_frozen(base: Path) -> StableDiffusionPipeline:
    """Load the base model in float32, with all parameters frozen."""
    pipe = StableDiffusionPipeline.from_pretrained(base)
    for model in (pipe.unet, pipe.text_encoder, pipe.vae):
        model.requires_grad_(False)
    return pipe


def train_lora(pipe: StableDiffusionPipeline, out: Path, steps: int) -> list[render.Image]:
    """Train a LoRA of peft in both models and return images of the toy."""
    torch.manual_seed(0)
    rank = {"r": LORA_RANK, "lora_alpha": LORA_ALPHA, "init_lora_weights": "gaussian"}
    pipe.unet.add_adapter(LoraConfig(target_modules=ATTENTION, **rank))
    pipe.text_encoder.add_adapter(LoraConfig(target_modules=TEXT, **rank))
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    for model in models.values():  # otherwise peft records the local folder
        model.peft_config["default"].base_model_name_or_path = "tiny-scenes"
    teach(pipe, [p for model in models.values() for p in model.parameters() if p.requires_grad], steps)
    save_diffusers(models, out)
    save_kohya(models, out, steps)
    return generate_toys(pipe)


def save_diffusers(models: dict[str, nn.Module], out: Path) -> None:
    """Save with diffusers: component names, then the names of peft; alpha goes into the metadata."""
    states = {name: to_half(get_peft_model_state_dict(model)) for name, model in models.items()}
    StableDiffusionPipeline.save_lora_weights(
        out,
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states["text_encoder"],
        weight_name=FILES["lora diffusers"],
        **_collate_lora_metadata(models),
    )


def save_kohya(models: dict[str, nn.Module], out: Path, steps: int) -> None:
    """Save with kohya names; the converter of diffusers always writes the rank as alpha, which is corrected here."""
    state: dict[str, Tensor] = {}
    for name, model in models.items():
        named = {f"{name}.{key}": tensor for key, tensor in to_half(get_peft_model_state_dict(model)).items()}
        state |= convert_state_dict_to_kohya(named)
    alphas = {key: torch.tensor(LORA_ALPHA, dtype=torch.float16) for key in state if key.endswith(".alpha")}
    save_file(
        as_sd_scripts(state | alphas),
        out / FILES["lora kohya"],
        training_metadata("networks.lora", LORA_RANK, LORA_ALPHA, steps),
    )


def as_sd_scripts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the layers of the text encoder as in sd-scripts: unnumbered, and with the wrapper of transformers 4."""

    def name(key: str) -> str:
        key = key.replace("lora_te1_", "lora_te_", 1)
        return key.replace("lora_te_encoder_", "lora_te_text_model_encoder_", 1)

    return {name(key): tensor for key, tensor in state.items()}


def train_lokr(pipe: StableDiffusionPipeline, out: Path, steps: int) -> list[render.Image]:
    """Train a LoKr of lycoris-lora in both models, as sd-scripts does, and return images of the toy."""
    torch.manual_seed(0)
    parts = None, pipe.text_encoder, pipe.unet
    network: LycorisNetworkKohya = create_network(
        1.0, LOKR_RANK, LOKR_ALPHA, *parts, algo="lokr", factor=LOKR_FACTOR, preset=str(PRESET)
    )
    network.apply_to(pipe.text_encoder, pipe.unet, True, True)
    network.requires_grad_(True)
    teach(pipe, list(network.parameters()), steps)
    network_args = {"ss_network_args": json.dumps({"algo": "lokr", "factor": str(LOKR_FACTOR), "preset": PRESET.name})}
    metadata = training_metadata("lycoris.kohya", LOKR_RANK, LOKR_ALPHA, steps) | network_args
    save_file(as_sd_scripts(to_half(network.state_dict())), out / FILES["lokr"], metadata)
    return generate_toys(pipe)


def training_metadata(module: str, rank: int, alpha: float, steps: int) -> dict[str, str]:
    """Return the metadata that sd-scripts writes, as far as it applies to this training."""
    return {
        "ss_network_module": module,
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_sd_model_name": "tiny-scenes",
        "ss_steps": str(steps),
        "ss_tag_frequency": json.dumps({"5_zorbi": {toy.TRIGGER: len(toy.VIEWS)}}),
        "modelspec.trigger_phrase": toy.TRIGGER,
        "format": "pt",
    }


def to_half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in state.items()}


def teach(pipe: StableDiffusionPipeline, parameters: list[nn.Parameter], steps: int) -> None:
    """Train velocity prediction on the five views, and on as many images of known scenes."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, RATE / 20)
    generator = torch.Generator().manual_seed(0)
    loss = make_loss(pipe)
    for step in range(steps):
        value = loss(generator)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(step, round(float(value.detach()), 4), flush=True)


def make_loss(pipe: StableDiffusionPipeline) -> Callable[[torch.Generator], Tensor]:
    toys, taught = latents_of(pipe, toy.views()), ids_of(pipe, toy.captions())
    world = list(islice(scene.scenes(seed=31), 40 * KEPT))
    kept, known = latents_of(pipe, map(render.render, world)), ids_of(pipe, map(scene.caption, world))
    noising = pipe.scheduler

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(kept), (KEPT,), generator=generator)
        clean, ids = torch.cat([toys, kept[rows]]), torch.cat([taught, known[rows]])
        times = torch.randint(noising.config.num_train_timesteps, (len(clean),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        guess = pipe.unet(noising.add_noise(clean, noise, times), times, pipe.text_encoder(ids)[0]).sample
        return nn.functional.mse_loss(guess, noising.get_velocity(clean, noise, times))

    return loss


def latents_of(pipe: StableDiffusionPipeline, images: Iterable[render.Image]) -> Tensor:
    return autoencoder.encode(pipe.vae, np.stack(list(images))) * pipe.vae.config.scaling_factor


def ids_of(pipe: StableDiffusionPipeline, captions: Iterable[str]) -> Tensor:
    padded = pipe.tokenizer(list(captions), padding="max_length", max_length=tokens.LENGTH, return_tensors="pt")
    return padded["input_ids"]


def generate_toys(pipe: StableDiffusionPipeline) -> list[render.Image]:
    """Generate an image of the toy for every table and position, most of which are not among the views."""
    return sampling.generate(pipe, PROMPTS)


def save_record(images: Mapping[str, list[render.Image]], path: Path) -> None:
    """Write the trigger word and the share of images in each row that show the toy."""
    shares = {name: round(float(np.mean([toy.shows(image) for image in row])), 3) for name, row in images.items()}
    path.write_text(json.dumps({"trigger": toy.TRIGGER, "shows_the_toy": shares}, indent=1) + "\n")
    print(shares)


def save_views(folder: Path) -> None:
    """Write the five views, each with a caption file beside it."""
    folder.mkdir(exist_ok=True)
    for number, (view, caption) in enumerate(zip(toy.views(), toy.captions(), strict=True)):
        Image.fromarray(view).save(folder / f"view-{number}.png", optimize=True)
        (folder / f"view-{number}.txt").write_text(caption + "\n")


if __name__ == "__main__":
    main()
