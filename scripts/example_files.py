"""Example files for the commands and the documents: the demo adapters, and a base model for them.

The base model is a pipeline folder with the layers of Stable Diffusion 1.5 that the adapters change, at their real
size, and little else. Its weights are noise: it cannot generate images, but it rounds like the real model.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import torch

from krona_hub.assets import __file__ as assets
from krona_hub.bases import catalog
from krona_hub.bases.name_table import table
from krona_hub.checkpoints.header import read_header
from krona_hub.checkpoints.reader import load
from krona_hub.checkpoints.writer import write_tensors
from krona_hub.cli.main import main
from scripts.make_demo_adapter import normal, projections

SEED = 15
SPREAD = 0.04  # standard deviation of the weights, similar to attention projections in SD 1.5
SETUP_COMMANDS = (  # create the other files of the folder
    "krona convert lokr.safetensors -o krona.safetensors",
    "krona merge base lora.safetensors:0.8 -o merged --undo undo.safetensors",
)


def output_of(command: str, folder: Path) -> str:
    """Run a command line in a folder and return what it prints to stdout."""
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        main(shlex.split(command)[1:])
    return printed.getvalue()


def example_folder(folder: Path, *, bf16: bool = False) -> Path:
    """Write the example files to a folder.

    These are lora, lokr and krona.safetensors; norms.safetensors, the LoRA with changes of a norm;
    new-model.safetensors, a LoKr of a base model that nobody knows; base and merged, two pipeline folders;
    undo.safetensors and blocks.txt. zorbi-lora and zorbi-lokr.safetensors are for tiny-scenes, the others for Stable
    Diffusion 1.5.
    With `bf16`, also `base-bf16`, the base model in bfloat16.
    """
    for name in ("lora", "lokr"):
        shutil.copyfile(Path(assets).parent / f"demo_{name}.safetensors", folder / f"{name}.safetensors")
    for name, trained in TRAINED.items():
        shutil.copyfile(Path(assets).parent / trained, folder / name)
    write_norms(folder / "lora.safetensors", folder / "norms.safetensors")
    write_unknown(folder / "new-model.safetensors")
    (folder / "blocks.txt").write_text(BLOCK_WEIGHTS)
    write_base(folder / "base", torch.float16)
    if bf16:
        write_base(folder / "base-bf16", torch.bfloat16)
    for command in SETUP_COMMANDS:
        output_of(command, folder)
    return folder


TRAINED = {"zorbi-lora.safetensors": "zorbi_lora_kohya.safetensors", "zorbi-lokr.safetensors": "zorbi_lokr.safetensors"}
BLOCK_WEIGHTS = """# the first block at half strength, no change of the cross attention's values
down_blocks\\.0\\. = 0.5
attn2\\.to_v$ = 0
"""


def write_norms(source: Path, path: Path) -> None:
    """Write a LoRA with the changes of a norm, as LyCORIS trains them with `train_norm`."""
    header = read_header(source)
    values = np.random.default_rng(SEED).standard_normal((2, 320)).astype(np.float32) * SPREAD
    vectors = {f"lora_unet_conv_norm_out.{part}": torch.from_numpy(v) for part, v in zip(NORM, values, strict=True)}
    write_tensors(path, load(header) | vectors, header.metadata)


NORM = ("w_norm", "b_norm")


def write_unknown(path: Path) -> None:
    """Write a LoKr for a base model that does not exist, with alpha unequal to the rank."""
    numbers, tensors = np.random.default_rng(SEED), {}
    for name in ("attention_q", "attention_k", "attention_v", "attention_o"):
        sizes = {"lokr_w1": (8, 8), "lokr_w2_a": (96, 4), "lokr_w2_b": (4, 96)}
        for part, size in sizes.items():
            values = numbers.standard_normal(size).astype(np.float32) * SPREAD
            tensors[f"lora_unet_glow_blocks_0_{name}.{part}"] = torch.from_numpy(values)
        tensors[f"lora_unet_glow_blocks_0_{name}.alpha"] = torch.tensor(2.0)
    write_tensors(path, tensors, {})


def write_base(folder: Path, dtype: torch.dtype) -> None:
    """Write a pipeline folder with a U-Net of a few layers."""
    unet = folder / "unet"
    unet.mkdir(parents=True)
    (folder / "model_index.json").write_text(_json(_class_name="StableDiffusionPipeline", unet=["diffusers", UNET]))
    (unet / "config.json").write_text(_json(_class_name=UNET, block_out_channels=[320, 640], cross_attention_dim=768))
    write_tensors(unet / "diffusion_pytorch_model.safetensors", weights(dtype), {"format": "pt"})


UNET = "UNet2DConditionModel"


def _json(**content: object) -> str:
    return json.dumps(content, indent=2) + "\n"


def weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return noise for the projections that the demo adapters change, and norms, which they do not change."""
    random, names = np.random.RandomState(SEED), table(catalog.get("sd15"))
    tensors = {}
    for module, out, in_ in projections():
        name = names.find(module)[0].layer.removeprefix("unet.")
        tensors[f"{name}.weight"] = torch.from_numpy(normal(random, out, in_) * np.float32(SPREAD))
        if name.endswith("attn1.to_q"):
            norm = name.replace("attn1.to_q", "norm1")
            tensors |= {f"{norm}.weight": torch.ones(out), f"{norm}.bias": torch.zeros(out)}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}
