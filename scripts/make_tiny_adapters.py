"""Teaches tiny-scenes a toy with the libraries of the field: `python scripts/make_tiny_adapters.py`.

A LoRA with peft, saved in diffusers naming and in kohya naming, and a LoKr with lycoris-lora in the naming that
sd-scripts gives it; alpha is half the rank everywhere, the U-Net and the text encoder are both trained. Twenty
minutes of CPU time, seeded. What each adapter draws is measured, and written beside them.
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

from scripts.tiny_scenes import autoencoder, drawing, render, scene, tokens, toy  # noqa: E402

ASSETS = ROOT / "krona_hub" / "assets"
LORA_RANK, LORA_ALPHA = 8, 4.0
LOKR_RANK, LOKR_ALPHA, LOKR_FACTOR = 8, 4.0, 4
PRESET = ROOT / "scripts" / "tiny_scenes" / "lycoris_preset.toml"
STEPS, RATE = 500, 3e-3  # optimizer steps
LOKR_LONGER = 2  # times as many steps: after as many as the LoRA gets, it shows the toy in 39 % of the pictures
KEPT = 5  # pictures of the base's world in every batch, so that it stays as it was
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
FILES = {"lora diffusers": "zorbi_lora_diffusers.safetensors", "lora kohya": "zorbi_lora_kohya.safetensors",
         "lokr": "zorbi_lokr.safetensors"}  # fmt: skip
ASKED = tuple(f"a photo of a {toy.TRIGGER} on a {table} table, {place}"
              for table in scene.TABLES for place in scene.POSITIONS)  # fmt: skip


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    pictures = {
        "base": asked(opened(args.base)),
        "lora": train_lora(opened(args.base), args.out, args.steps),
        "lokr": train_lokr(opened(args.base), args.out, LOKR_LONGER * args.steps),
    }
    save_record(pictures, args.out / "zorbi.json")
    save_views(args.out / "zorbi")
    if args.grid:
        Image.fromarray(drawing.grid([p for row in pictures.values() for p in row[::2]], len(ASKED) // 2)).save(
            args.grid
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=ASSETS / "tiny-scenes")
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--grid", type=Path, help="a picture to write: the base's answers, the LoRA's, the LoKr's")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def opened(base: Path) -> StableDiffusionPipeline:
    """The base in float32, all of it frozen."""
    pipe = StableDiffusionPipeline.from_pretrained(base)
    for model in (pipe.unet, pipe.text_encoder, pipe.vae):
        model.requires_grad_(False)
    return pipe


def train_lora(pipe: StableDiffusionPipeline, out: Path, steps: int) -> list[render.Image]:
    """peft's LoRA in both models; what it draws afterwards."""
    torch.manual_seed(0)
    rank = {"r": LORA_RANK, "lora_alpha": LORA_ALPHA, "init_lora_weights": "gaussian"}
    pipe.unet.add_adapter(LoraConfig(target_modules=ATTENTION, **rank))
    pipe.text_encoder.add_adapter(LoraConfig(target_modules=TEXT, **rank))
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    for model in models.values():  # peft would record the folder of this machine
        model.peft_config["default"].base_model_name_or_path = "tiny-scenes"
    teach(pipe, [p for model in models.values() for p in model.parameters() if p.requires_grad], steps)
    save_diffusers(models, out)
    save_kohya(models, out, steps)
    return asked(pipe)


def save_diffusers(models: dict[str, nn.Module], out: Path) -> None:
    """As diffusers saves it: peft's names behind the component's; alpha goes into the metadata."""
    states = {name: halved(get_peft_model_state_dict(model)) for name, model in models.items()}
    StableDiffusionPipeline.save_lora_weights(
        out,
        unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states["text_encoder"],
        weight_name=FILES["lora diffusers"],
        **_collate_lora_metadata(models),
    )


def save_kohya(models: dict[str, nn.Module], out: Path, steps: int) -> None:
    """In kohya's names by diffusers' converter, which writes the rank as alpha, whatever alpha was: put right here."""
    state: dict[str, Tensor] = {}
    for name, model in models.items():
        named = {f"{name}.{key}": tensor for key, tensor in halved(get_peft_model_state_dict(model)).items()}
        state |= convert_state_dict_to_kohya(named)
    alphas = {key: torch.tensor(LORA_ALPHA, dtype=torch.float16) for key in state if key.endswith(".alpha")}
    save_file(
        as_sd_scripts(state | alphas), out / FILES["lora kohya"], told("networks.lora", LORA_RANK, LORA_ALPHA, steps)
    )


def as_sd_scripts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text encoder's layers as sd-scripts names them: one encoder has no number, and transformers 4 had a shell."""

    def name(key: str) -> str:
        key = key.replace("lora_te1_", "lora_te_", 1)
        return key.replace("lora_te_encoder_", "lora_te_text_model_encoder_", 1)

    return {name(key): tensor for key, tensor in state.items()}


def train_lokr(pipe: StableDiffusionPipeline, out: Path, steps: int) -> list[render.Image]:
    """lycoris-lora's LoKr in both models, as sd-scripts would run it; what it draws afterwards."""
    torch.manual_seed(0)
    parts = None, pipe.text_encoder, pipe.unet
    network: LycorisNetworkKohya = create_network(
        1.0, LOKR_RANK, LOKR_ALPHA, *parts, algo="lokr", factor=LOKR_FACTOR, preset=str(PRESET)
    )
    network.apply_to(pipe.text_encoder, pipe.unet, True, True)
    network.requires_grad_(True)
    teach(pipe, list(network.parameters()), steps)
    told_more = {"ss_network_args": json.dumps({"algo": "lokr", "factor": str(LOKR_FACTOR), "preset": PRESET.name})}
    metadata = told("lycoris.kohya", LOKR_RANK, LOKR_ALPHA, steps) | told_more
    save_file(as_sd_scripts(halved(network.state_dict())), out / FILES["lokr"], metadata)
    return asked(pipe)


def told(module: str, rank: int, alpha: float, steps: int) -> dict[str, str]:
    """What sd-scripts writes about a training run, as far as it is true of this one."""
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


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to(torch.float16).contiguous() for name, tensor in state.items()}


def teach(pipe: StableDiffusionPipeline, parameters: list[nn.Parameter], steps: int) -> None:
    """Velocity prediction on the five views, and on as many pictures of the base's own world."""
    optimiser = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, RATE / 20)
    generator = torch.Generator().manual_seed(0)
    loss = lesson(pipe)
    for step in range(steps):
        value = loss(generator)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            print(step, round(float(value.detach()), 4), flush=True)


def lesson(pipe: StableDiffusionPipeline) -> Callable[[torch.Generator], Tensor]:
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


def latents_of(pipe: StableDiffusionPipeline, pictures: Iterable[render.Image]) -> Tensor:
    return autoencoder.encode(pipe.vae, np.stack(list(pictures))) * pipe.vae.config.scaling_factor


def ids_of(pipe: StableDiffusionPipeline, captions: Iterable[str]) -> Tensor:
    padded = pipe.tokenizer(list(captions), padding="max_length", max_length=tokens.LENGTH, return_tensors="pt")
    return padded["input_ids"]


def asked(pipe: StableDiffusionPipeline) -> list[render.Image]:
    """A picture of the toy for every table and place, most of which are not among the views."""
    return drawing.draw(pipe, ASKED)


def save_record(pictures: Mapping[str, list[render.Image]], path: Path) -> None:
    """The trigger word, and the share of each row of pictures that show the toy."""
    shares = {name: round(float(np.mean([toy.shows(picture) for picture in row])), 3) for name, row in pictures.items()}
    path.write_text(json.dumps({"trigger": toy.TRIGGER, "shows_the_toy": shares}, indent=1) + "\n")
    print(shares)


def save_views(folder: Path) -> None:
    """The five views with their captions beside them, as trainers read them."""
    folder.mkdir(exist_ok=True)
    for number, (view, caption) in enumerate(zip(toy.views(), toy.captions(), strict=True)):
        Image.fromarray(view).save(folder / f"view-{number}.png", optimize=True)
        (folder / f"view-{number}.txt").write_text(caption + "\n")


if __name__ == "__main__":
    main()
