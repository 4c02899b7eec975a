"""Benchmark training steps of SDXL on a GPU: the adapters of this project against the diffusers recipe and peers.

    python benchmarks/gpu_train.py                  # on CUDA; writes results/gpu_train.json with the device name
    python benchmarks/gpu_train.py --tiny           # a dry run on the CPU in a minute, without output files

Uses a U-Net with the shapes of SDXL and random bfloat16 weights, 1024 px, batch sizes 1 and 4, with and without
checkpointing. A step samples noise, runs forward and backward with float32 factors under autocast, clips, and runs
AdamW. "peft lora r=4" is the recipe of the SDXL script of diffusers. Reports milliseconds between CUDA events and the
peak of torch's allocator, with one variant at a time on the device. Variants that do not fit are null.
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

VARIANTS = ("krona 64x4", "krona 8x8", "peft lora r=4", "peft lokr", "lycoris bypass", "lycoris rebuild")
WARM_UP = 3  # steps


def step_of(
    config: Mapping[str, Any], device: torch.device, variant: str, batch: int, side: int, checkpointing: bool
) -> Callable[[], object]:
    torch.manual_seed(0)
    model = unet(config, device, checkpointing)
    adapt(model, variant)
    model.to(device)
    inputs = inputs_of(config, device, batch, side)
    latents = inputs.pop("sample")

    def call(noisy: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, HALF[device.type], enabled=device.type == "cuda"):
            prediction: torch.Tensor = model(noisy, **inputs).sample
        return prediction

    return stepping(model, call, latents)


def measure_variant(
    config: Mapping[str, Any], device: torch.device, variant: str, args: argparse.Namespace, **how: Any
) -> Any:
    """Return milliseconds and peak memory of one variant, alone on the device."""
    try:
        step, clock = step_of(config, device, variant, **how), Clock(device)
        for _ in range(WARM_UP if device.type == "cuda" else 1):
            step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken = [clock.time(step) for _ in range(args.rounds)]
        peak = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else 0.0
        return {**summary(taken), "peak MB": round(peak)}
    except torch.cuda.OutOfMemoryError:
        return None
    except Exception as error:  # a peer that fails must not end a run of an hour
        return f"{type(error).__name__}: {str(error)[:100]}"
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from krona_hub.bases import catalog

    config = json.loads((Path(catalog.__file__).parent / "catalog" / "sdxl.unet.json").read_text())["config"]
    config |= TINY_UNET if args.tiny else {}
    side = 8 if args.tiny else args.size // 8
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    for batch, checkpointing in product((1, 4), (False, True)):
        how = {"batch": batch, "side": side, "checkpointing": checkpointing}
        name = f"batch {batch}" + (" checkpointing" if checkpointing else "")
        results[name] = {variant: measure_variant(config, device, variant, args, **how) for variant in VARIANTS}
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="Use tiny sizes, on the CPU if there is no GPU.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", type=int, default=1024, help="Image size in pixels.")
    args = parser.parse_args()
    if not (args.tiny or torch.cuda.is_available()):
        raise SystemExit("No CUDA device found. Use --tiny for a dry run on the CPU.")
    results = measure(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if args.tiny:
        print(json.dumps(results, indent=2))
    else:
        report("gpu_train", results)


if __name__ == "__main__":
    main()
