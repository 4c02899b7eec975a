"""Benchmark layers on a GPU: the table of bench_layers.py, and training steps of an SDXL U-Net in bfloat16.

    python benchmarks/gpu_layers.py                 # on CUDA; writes results/gpu_layers.json with the device name
    python benchmarks/gpu_layers.py --tiny          # a dry run on the CPU in a minute or two, without output files

Milliseconds are measured between CUDA events after a warm-up, best and median of nine rounds; the variants alternate in
every round. LyCORIS compiles its Triton kernels during the warm-up. A step of the U-Net is forward and backward without
an optimizer; its peak memory is that of torch's allocator. Variants that do not fit into memory are reported as null.
`--part table` or `--part unet` runs only one part.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from common import report
from layer_peers import VARIANTS, adapt, build
from torch import nn

SHAPES = {"1280x1280": (1280, 1280, 1024), "640x640": (640, 640, 4096), "1280x2048": (1280, 2048, 77)}  # out, in, N
TINY_SHAPES = {"128x64": (128, 64, 16)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HALF = {"cuda": torch.bfloat16, "cpu": torch.float32}  # bfloat16 is slow on many CPUs
TINY_UNET = {
    "block_out_channels": [64, 64, 128],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1, 1],
    "attention_head_dim": [2, 4, 4],
    "cross_attention_dim": 64,
    "projection_class_embeddings_input_dim": 6 * 256 + 64,
}


class Clock:
    """A clock for work on the device, in milliseconds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def time(self, work: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = perf_counter()
            work()
            return 1e3 * (perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))


def summary(taken: list[float]) -> dict[str, float]:
    return {"best": round(min(taken), 3), "median": round(median(taken), 3)}


def stepping(
    layer: nn.Module, inputs: tuple[torch.Tensor, ...], call: Callable[..., Any] | None = None
) -> Callable[[], None]:
    """Return a function that drops old gradients and runs one forward and backward pass."""

    run = layer if call is None else call

    def work() -> None:
        layer.zero_grad(set_to_none=True)
        for x in inputs:
            x.grad = None
        run(*inputs).float().square().mean().backward()

    return work


def table(device: torch.device, shapes: Mapping[str, tuple[int, int, int]], rounds: int) -> dict[str, Any]:
    """Measure the steps of single layers, with each adapter and without one."""
    clock, results = Clock(device), {}
    for (dtype, kind), (shape, (out, in_, rows)), compiled in product(DTYPES.items(), shapes.items(), (False, True)):
        x = torch.randn(1, rows, in_, device=device, dtype=kind, requires_grad=True)
        works, found = {}, {}
        for variant in VARIANTS:
            layer = build(variant, out, in_).to(device, kind)
            work = stepping(layer, (x,), torch.compile(layer) if compiled else None)
            try:
                for _ in range(3):
                    work()
                works[variant] = work
            except Exception as error:  # a peer that cannot be compiled must not end a run of an hour
                found[variant] = f"{type(error).__name__}: {str(error)[:100]}"
        taken = [{variant: clock.time(work) for variant, work in works.items()} for _ in range(rounds)]
        found |= {variant: summary([one[variant] for one in taken]) for variant in works}
        results[f"{shape} {dtype} {'compiled' if compiled else 'eager'}"] = found
    return results


def unet(config: Mapping[str, Any], device: torch.device, checkpointing: bool) -> nn.Module:
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        model = UNet2DConditionModel.from_config(dict(config)).to(HALF[device.type]).requires_grad_(False).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


def inputs_of(config: Mapping[str, Any], device: torch.device, batch: int, side: int) -> dict[str, Any]:
    width, like = config["cross_attention_dim"], {"device": device, "dtype": HALF[device.type]}
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    more = {"text_embeds": torch.randn(batch, pooled, **like), "time_ids": torch.ones(batch, 6, **like)}
    return {
        "sample": torch.randn(batch, 4, side, side, **like),
        "timestep": torch.full((batch,), 500, device=device),
        "encoder_hidden_states": torch.randn(batch, 77, width, **like),
        "added_cond_kwargs": more,
    }


def unet_step(
    config: Mapping[str, Any], device: torch.device, variant: str, batch: int, side: int, rounds: int, **how: bool
) -> dict[str, float]:
    model = unet(config, device, how["checkpointing"])
    adapt(model, variant)
    model.to(device, HALF[device.type])
    called = torch.compile(model) if how["compiled"] else model
    inputs, clock = inputs_of(config, device, batch, side), Clock(device)
    if not any(p.requires_grad for p in model.parameters()):  # the bare model: the lower bound of a step
        inputs["sample"].requires_grad_()
    work = stepping(model, (), lambda: called(**inputs).sample)
    for _ in range(2):
        work()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = summary([clock.time(work) for _ in range(rounds)])
    peak = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else 0.0
    return {**found, "peak MB": round(peak)}


def whole_unet(
    config: Mapping[str, Any], device: torch.device, side: int, rounds: int, compiling: tuple[bool, ...]
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for batch, checkpointing, compiled in product((1, 4), (False, True), compiling):
        marks = ("checkpointing",) * checkpointing + ("compiled" if compiled else "eager",)
        row = results.setdefault(" ".join((f"batch {batch}", *marks)), {})
        for variant in VARIANTS:
            torch._dynamo.reset()
            try:
                how = {"checkpointing": checkpointing, "compiled": compiled}
                row[variant] = unet_step(config, device, variant, batch, side, rounds, **how)
            except torch.cuda.OutOfMemoryError:
                row[variant] = None
            except Exception as error:
                row[variant] = f"{type(error).__name__}: {str(error)[:100]}"
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true", help="Use tiny sizes, on the CPU if there is no GPU.")
    parser.add_argument("--part", choices=("table", "unet"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", type=int, default=1024, help="Image size in pixels.")
    args = parser.parse_args()
    if not (args.tiny or torch.cuda.is_available()):
        raise SystemExit("No CUDA device found. Use --tiny for a dry run on the CPU.")
    torch.manual_seed(0)
    results = measure(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if args.tiny:
        print(json.dumps(results, indent=2))
    else:
        report("gpu_layers" if not args.part else f"gpu_layers_{args.part}", results)


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    from krona_hub.bases import catalog

    config = json.loads((Path(catalog.__file__).parent / "catalog" / "sdxl.unet.json").read_text())["config"]
    rounds, side = (1, 8) if args.tiny else (args.rounds, args.size // 8)
    compiling = (False,) if args.tiny else (False, True)
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
    if args.part != "unet":
        results["layer, ms"] = table(device, TINY_SHAPES if args.tiny else SHAPES, rounds)
    if args.part != "table":
        results["SDXL U-Net"] = whole_unet(config | (TINY_UNET if args.tiny else {}), device, side, rounds, compiling)
    return results


if __name__ == "__main__":
    main()
