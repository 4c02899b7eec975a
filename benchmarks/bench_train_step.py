"""A whole training step, this project's adapters against PEFT's and LyCORIS's in one harness.

    python benchmarks/bench_train_step.py            # U-Nets of tiny-scenes' and of SD1.5's size, the latter at 256 px
    python benchmarks/bench_train_step.py --tiny     # the small one alone

Noise is added, the U-Net is run forward and backward, the gradient's norm is clipped, AdamW makes a step; float32, one
thread, adapters on q, k, v and out of every attention. Process CPU time, the ways in turn in every round, best and
median of the rounds. The memory of the same step is what bench_layers_memory.py measures, a process for each way.
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

WAYS = ("base", "krona 64x4", "krona 8x8", "peft lokr", "peft lora r=4", "lycoris bypass", "lycoris rebuild")
PEERS = ("peft lokr", "lycoris bypass", "lycoris rebuild")
SIZES = {"tiny-scenes": ("tiny-scenes.unet.json", 8, 32), "sd15": ("sd15.unet.json", 32, 77)}  # latents, tokens
CLIP = 1.0


def fits(way: str, size: str) -> bool:
    """64 does not divide the channels of tiny-scenes."""
    return (way, size) != ("krona 64x4", "tiny-scenes")


def unet(file: str) -> nn.Module:
    from diffusers import UNet2DConditionModel

    from krona_hub.bases import catalogue

    config = json.loads((Path(catalogue.__file__).parent / "catalogue" / file).read_text())["config"]
    return UNet2DConditionModel.from_config(config).requires_grad_(False).train()


def stepping(model: nn.Module, call: Callable[[Tensor], Tensor], latents: Tensor) -> Callable[[], object]:
    """A training step: every way trains what `requires_grad`, in float32 factors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()
    if not parameters:  # the bare model: the least that a step can take
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
    base, ways = unet(file), [way for way in WAYS if fits(way, size)]
    steps = {way: _step_of(base, way, side, tokens) for way in ways}
    for step in steps.values():
        step()
    taken = [{way: seconds(step) for way, step in steps.items()} for _ in range(rounds)]
    found = {way: [one[way] for one in taken] for way in ways}
    return {way: {"best": round(min(t), 4), "median": round(median(t), 4)} for way, t in found.items()}


def _step_of(base: nn.Module, way: str, side: int, tokens: int) -> Callable[[], object]:
    """Of a copy of the base that shares its weights: seven of SD1.5's size would need 24 GB."""
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    adapt(model, way)
    text = torch.randn(1, tokens, model.config.cross_attention_dim)
    return stepping(model, lambda x: model(x, 500, text).sample, torch.randn(1, model.config.in_channels, side, side))


def verdicts(made: Mapping[str, Mapping[str, float]]) -> dict[str, bool]:
    """Whether ours is as fast as theirs, of equal splits."""
    ours = made["krona 8x8"]["best"]
    return {f"krona 8x8 is not slower than {way}": ours <= made[way]["best"] for way in PEERS}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--tiny", action="store_true")
    options.add_argument("--rounds", type=int, default=9)
    given = options.parse_args()
    torch.set_num_threads(1)
    made = {size: measure(size, given.rounds) for size in SIZES if size == "tiny-scenes" or not given.tiny}
    met = {size: verdicts(figures) for size, figures in made.items()}
    report("train_step_tiny" if given.tiny else "train_step", {"CPU seconds of a step": made, "met": met})


if __name__ == "__main__":
    main()
