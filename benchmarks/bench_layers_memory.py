"""The most memory that a training step of a U-Net of SD1.5's size takes, by kind of adapter; a process for each.

860 M random numbers in float32, frozen; adapters on q, k, v and out of every attention; one picture of 256 px (latents
of 32×32), AdamW, two steps. What is reported is the most that the process holds in the steps (VmHWM, reset before
them), in MB, and the same less what it held at rest before them. `--small` takes a U-Net with a fifth of the
channels.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import report
from layer_peers import adapt
from torch import nn

CATALOGUE = "sd15.unet.json"
WAYS = ("krona 64x4", "krona 8x8", "peft lora r=4", "peft lokr", "lycoris bypass")


def unet(small: bool) -> nn.Module:
    from diffusers import UNet2DConditionModel

    from krona_hub.bases import catalogue

    config = json.loads((Path(catalogue.__file__).parent / "catalogue" / CATALOGUE).read_text())["config"]
    if small:
        config |= {"block_out_channels": [64, 128, 256, 256], "norm_num_groups": 16}
    return UNet2DConditionModel.from_config(config).requires_grad_(False)


def held(name: str) -> float:
    """MB of a line of /proc/self/status: VmRSS now, VmHWM the most so far."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3


def run(way: str, small: bool) -> dict[str, float]:
    """Two steps, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = unet(small).train()
    adapt(model, way)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is held now
    for _ in range(2):
        latents, text = torch.randn(1, 4, 32, 32), torch.randn(1, 77, model.config.cross_attention_dim)
        model(latents, 500, text).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = held("VmHWM")
    return {"parameters": sum(p.numel() for p in parameters), "peak MB": peak, "MB for the steps": peak - before}


def in_a_process(way: str, small: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--way", way, *(["--small"] if small else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return {k: round(v) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--small", action="store_true")
    options.add_argument("--way", choices=WAYS, help="Only this, in this process, as JSON.")
    given = options.parse_args()
    if given.way:
        print(json.dumps(run(given.way, given.small)))
        return
    made = {way: in_a_process(way, given.small) for way in WAYS}
    peaks = {way: figures["peak MB"] for way, figures in made.items()}
    ours = peaks["krona 64x4"]
    met = {way: ours < peaks[way] for way in ("peft lora r=4", "peft lokr")}
    report("layers_memory_small" if given.small else "layers_memory", {**made, "krona 64x4 is below": met})


if __name__ == "__main__":
    main()
