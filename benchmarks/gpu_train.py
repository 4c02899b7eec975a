"""Training steps of SDXL's size on a GPU: this project's adapters against the diffusers recipe and LoKr by its peers.

    python benchmarks/gpu_train.py                  # on CUDA; writes results/gpu_train.json with the device's name
    python benchmarks/gpu_train.py --tiny           # a dry run on the CPU in a minute: nothing is written

A U-Net of SDXL's shape with random weights in bfloat16, 1024 px, batch 1 and 4, with checkpointing and without;
factors in float32 under autocast, noise, forward, backward, clipping, AdamW. The recipe of diffusers' SDXL script is
"peft lora r=4". Milliseconds between CUDA events and the peak of torch's allocator, each way alone on the device.
What does not fit is null.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bench_train_step import stepping
from common import report
from gpu_layers import HALF, TINY_UNET, Clock, inputs_of, summary, unet
from layer_peers import adapt

WAYS = ("krona 64x4", "krona 8x8", "peft lora r=4", "peft lokr", "lycoris bypass", "lycoris rebuild")
WARM_UP = 3  # steps


def step_of(
    config: Mapping[str, Any], device: torch.device, way: str, batch: int, side: int, checkpointing: bool
) -> Callable[[], object]:
    torch.manual_seed(0)
    model = unet(config, device, checkpointing)
    adapt(model, way)
    model.to(device)
    inputs = inputs_of(config, device, batch, side)
    latents = inputs.pop("sample")

    def call(noisy: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, HALF[device.type], enabled=device.type == "cuda"):
            said: torch.Tensor = model(noisy, **inputs).sample
        return said

    return stepping(model, call, latents)


def one_way(config: Mapping[str, Any], device: torch.device, way: str, given: argparse.Namespace, **how: Any) -> Any:
    """Milliseconds and the peak of one way, alone on the device."""
    try:
        step, clock = step_of(config, device, way, **how), Clock(device)
        for _ in range(WARM_UP if device.type == "cuda" else 1):
            step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = [clock.time(step) for _ in range(given.rounds)]
        peak = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else 0.0
        return {**summary(taken), "peak MB": round(peak)}
    except torch.cuda.OutOfMemoryError:
        return None
    except Exception as error:  # a peer that cannot do it ends no run of an hour
        return f"{type(error).__name__}: {str(error)[:100]}"
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from krona_hub.bases import catalogue

    config = json.loads((Path(catalogue.__file__).parent / "catalogue" / "sdxl.unet.json").read_text())["config"]
    config |= TINY_UNET if given.tiny else {}
    side = 8 if given.tiny else given.size // 8
    made: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    for batch, checkpointing in product((1, 4), (False, True)):
        how = {"batch": batch, "side": side, "checkpointing": checkpointing}
        name = f"batch {batch}" + (" checkpointing" if checkpointing else "")
        made[name] = {way: one_way(config, device, way, given, **how) for way in WAYS}
    return made


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--tiny", action="store_true", help="Tiny sizes, on the CPU where there is no GPU.")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--size", type=int, default=1024, help="pixels")
    given = options.parse_args()
    if not (given.tiny or torch.cuda.is_available()):
        raise SystemExit("There is no CUDA device here. --tiny makes a dry run on the CPU.")
    made = measure(given, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if given.tiny:
        print(json.dumps(made, indent=2))
    else:
        report("gpu_train", made)


if __name__ == "__main__":
    main()
