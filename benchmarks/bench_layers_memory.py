"""The most memory that a training step of a U-Net takes, by kind of adapter; a process for each.

    python benchmarks/bench_layers_memory.py                     # of SD1.5's size, one picture of 256 px
    python benchmarks/bench_layers_memory.py --size tiny-scenes  # of tiny-scenes', 25 pictures of 64 px

Random numbers in float32, frozen; adapters on q, k, v and out of every attention, AdamW, two steps. What is reported is
the most that the process holds in the steps (VmHWM, reset before them), in MB, and the same less what it held at rest
before them.
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
from bench_train_step import SIZES, fits, unet
from common import report
from layer_peers import adapt

WAYS = ("krona 64x4", "krona 8x8", "peft lora r=4", "peft lokr", "lycoris bypass", "lycoris rebuild")
PEERS = ("peft lokr", "lycoris bypass", "lycoris rebuild")
BATCHES = {"sd15": 1, "tiny-scenes": 25}


def held(name: str) -> float:
    """MB of a line of /proc/self/status: VmRSS now, VmHWM the most so far."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3


def run(way: str, size: str) -> dict[str, float]:
    """Two steps, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    file, side, tokens = SIZES[size]
    model, batch = unet(file), BATCHES[size]
    adapt(model, way)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is held now
    for _ in range(2):
        latents = torch.randn(batch, model.config.in_channels, side, side)
        text = torch.randn(batch, tokens, model.config.cross_attention_dim)
        model(latents, 500, text).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = held("VmHWM")
    return {"parameters": sum(p.numel() for p in parameters), "peak MB": peak, "MB for the steps": peak - before}


def in_a_process(way: str, size: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--way", way, "--size", size]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return {k: round(v, 1) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--size", choices=tuple(SIZES), default="sd15")
    options.add_argument("--way", choices=WAYS, help="Only this, in this process, as JSON.")
    given = options.parse_args()
    if given.way:
        print(json.dumps(run(given.way, given.size)))
        return
    made = {way: in_a_process(way, given.size) for way in WAYS if fits(way, given.size)}
    peaks = {way: figures["peak MB"] for way, figures in made.items()}
    met = {f"{ours} is below": {way: peaks[ours] < peaks[way] for way in PEERS} for ours in made if "krona" in ours}
    report("layers_memory" if given.size == "sd15" else f"layers_memory_{given.size}", {**made, **met})


if __name__ == "__main__":
    main()
