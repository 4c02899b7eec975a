"""Benchmark the peak memory of a training step of a U-Net by kind of adapter, each in a separate process.

    python benchmarks/bench_layers_memory.py                     # U-Net of SD 1.5, one image of 256 px
    python benchmarks/bench_layers_memory.py --size tiny-scenes  # U-Net of tiny-scenes, 25 images of 64 px

The weights are random, in float32 and frozen; adapters on q, k, v and out of every attention are trained with AdamW
for two steps. Reports the peak memory of the process during the steps (VmHWM, reset before them) in MB, and the same
without the memory that the process held before the steps.
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

VARIANTS = ("krona 64x4", "krona 8x8", "peft lora r=4", "peft lokr", "lycoris bypass", "lycoris rebuild")
PEERS = ("peft lokr", "lycoris bypass", "lycoris rebuild")
BATCHES = {"sd15": 1, "tiny-scenes": 25}


def memory_mb(name: str) -> float:
    """Return a line of /proc/self/status in MB: VmRSS is the current memory, VmHWM the peak."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3


def run(variant: str, size: str) -> dict[str, float]:
    """Run two steps in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    file, side, tokens = SIZES[size]
    model, batch = unet(file), BATCHES[size]
    adapt(model, variant)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    before = memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current memory
    for _ in range(2):
        latents = torch.randn(batch, model.config.in_channels, side, side)
        text = torch.randn(batch, tokens, model.config.cross_attention_dim)
        model(latents, 500, text).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = memory_mb("VmHWM")
    return {"parameters": sum(p.numel() for p in parameters), "peak MB": peak, "MB for the steps": peak - before}


def in_a_process(variant: str, size: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--way", variant, "--size", size]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return {k: round(v, 1) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=tuple(SIZES), default="sd15")
    parser.add_argument("--way", dest="variant", choices=VARIANTS, help="Only this variant, in this process, as JSON.")
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(run(args.variant, args.size)))
        return
    results = {variant: in_a_process(variant, args.size) for variant in VARIANTS if fits(variant, args.size)}
    peaks = {variant: figures["peak MB"] for variant, figures in results.items()}
    met = {
        f"{ours} is below": {variant: peaks[ours] < peaks[variant] for variant in PEERS}
        for ours in results
        if "krona" in ours
    }
    report("layers_memory" if args.size == "sd15" else f"layers_memory_{args.size}", {**results, **met})


if __name__ == "__main__":
    main()
