"""Benchmark a complete training step: the adapters of this project against PEFT and LyCORIS in one harness.

    python benchmarks/bench_train_step.py            # the U-Nets of tiny-scenes and of SD 1.5, the latter at 256 px
    python benchmarks/bench_train_step.py --tiny     # only the small one

A step adds noise, runs the U-Net forward and backward, clips the gradient norm and runs AdamW, in float32 on one
thread, with adapters on q, k, v and out of every attention. Reports process CPU time, best and median of the rounds;
the variants alternate in every round. bench_layers_memory.py measures the memory of the same step in separate
processes.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from common import report
from layer_peers import adapt
from torch import Tensor, nn

VARIANTS = ("base", "krona 64x4", "krona 8x8", "peft lokr", "peft lora r=4", "lycoris bypass", "lycoris rebuild")
PEERS = ("peft lokr", "lycoris bypass", "lycoris rebuild")
SIZES = {"tiny-scenes": ("tiny-scenes.unet.json", 8, 32), "sd15": ("sd15.unet.json", 32, 77)}  # latents, tokens
CLIP = 1.0


def fits(variant: str, size: str) -> bool:
    """Return whether a variant fits; 64 does not divide the channels of tiny-scenes."""
    return (variant, size) != ("krona 64x4", "tiny-scenes")


def unet(file: str) -> nn.Module:
    from diffusers import UNet2DConditionModel

    from krona_hub.bases import catalog

    config = json.loads((Path(catalog.__file__).parent / "catalog" / file).read_text())["config"]
    return UNet2DConditionModel.from_config(config).requires_grad_(False).train()


def stepping(model: nn.Module, call: Callable[[Tensor], Tensor], latents: Tensor) -> Callable[[], object]:
    """Return a training step for all parameters that require gradients, in float32."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()
    if not parameters:  # the bare model: the lower bound of a step
        parameters = [nn.Parameter(torch.zeros((), device=latents.device))]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step() -> None:
        noise = torch.randn_like(latents)
        noisy = 0.8 * latents + 0.6 * noise
        noisy.requires_grad_(not any(p.requires_grad for p in model.parameters()))
        (call(noisy).float() - noise.float()).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], object]) -> float:
    start = process_time()
    step()
    return process_time() - start


def measure(size: str, rounds: int) -> dict[str, Any]:
    file, side, tokens = SIZES[size]
    torch.manual_seed(0)
    base, variants = unet(file), [variant for variant in VARIANTS if fits(variant, size)]
    steps = {variant: _step_of(base, variant, side, tokens) for variant in variants}
    for step in steps.values():
        step()
    taken = [{variant: seconds(step) for variant, step in steps.items()} for _ in range(rounds)]
    found = {variant: [one[variant] for one in taken] for variant in variants}
    return {variant: {"best": round(min(t), 4), "median": round(median(t), 4)} for variant, t in found.items()}


def _step_of(base: nn.Module, variant: str, side: int, tokens: int) -> Callable[[], object]:
    """Return a step of a copy of the base that shares its weights: seven U-Nets of SD 1.5 would need 24 GB."""
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    adapt(model, variant)
    text = torch.randn(1, tokens, model.config.cross_attention_dim)
    return stepping(model, lambda x: model(x, 500, text).sample, torch.randn(1, model.config.in_channels, side, side))


def verdicts(results: Mapping[str, Mapping[str, float]]) -> dict[str, bool]:
    """Return whether our adapter is at least as fast as the others with the same shape."""
    ours = results["krona 8x8"]["best"]
    return {f"krona 8x8 is not slower than {variant}": ours <= results[variant]["best"] for variant in PEERS}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {size: measure(size, args.rounds) for size in SIZES if size == "tiny-scenes" or not args.tiny}
    met = {size: verdicts(figures) for size, figures in results.items()}
    report("train_step_tiny" if args.tiny else "train_step", {"CPU seconds of a step": results, "met": met})


if __name__ == "__main__":
    main()
