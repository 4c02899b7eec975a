"""Benchmark forward and backward of one linear layer with an adapter against PEFT and LyCORIS in one process.

Measures process CPU time on one thread. The variants alternate in every round, starting with a different one, and the
fastest of a few steps counts, because other programs disturb such short steps; reported are the best and the median of
nine rounds. The cost of an adapter is the time of its step minus that of the bare layer, whose input needs a gradient
and whose weight is frozen. The variants with the same shape (8x8, full w2) have equal parameters; 64x4 has fewer, and
PEFT's LoRA of rank 4 has more than 64x4. `--dtype float32`, `--rounds N` and `--shape 640x640` reduce the running time;
bfloat16 is slow on a CPU without support for it.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections import deque
from collections.abc import Mapping
from statistics import median
from time import process_time
from typing import Any

import torch
from common import report
from layer_peers import VARIANTS, build, check_equal_parameters
from torch import Tensor, nn

SHAPES = {"1280x1280": (1280, 1280, 1024), "640x640": (640, 640, 4096), "1280x2048": (1280, 2048, 77)}  # out, in, N
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SECONDS_PER_ROUND = 0.5  # per variant, with at most MAX_STEPS steps
MAX_STEPS = 20
# maximum ratios of ours to theirs, for each shape with a target
COSTS = {
    "krona 8x8 / peft lokr": {"1280x1280": 0.2, "640x640": 0.5},
    "krona 8x8 / lycoris bypass": dict.fromkeys(SHAPES, 1.15),
    "krona 64x4 / lycoris bypass": dict.fromkeys(SHAPES, 0.75),
}
STEPS = {"krona 64x4 / peft lora r=4": dict.fromkeys(SHAPES, 1.15)}


def fastest(layer: nn.Module, x: Tensor, g: Tensor, steps: int) -> float:
    return min(step(layer, x, g) for _ in range(steps))


def step(layer: nn.Module, x: Tensor, g: Tensor) -> float:
    """Return the seconds of one forward and backward pass; gradients of the previous step are dropped before."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    start = process_time()
    layer(x).backward(g)
    return process_time() - start


def measure(out: int, in_: int, rows: int, dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    layers = {variant: build(variant, out, in_).to(dtype) for variant in VARIANTS}
    x = torch.randn(1, rows, in_, dtype=dtype, requires_grad=True)
    g = torch.randn(1, rows, out, dtype=dtype)
    first = [step(layer, x, g) for layer in layers.values()]
    steps = max(1, min(MAX_STEPS, round(SECONDS_PER_ROUND / min(first))))
    taken: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    gc.disable()
    for i in range(rounds):
        order = deque(VARIANTS)
        order.rotate(-i)
        for variant in order:
            taken[variant].append(fastest(layers[variant], x, g, steps))
    gc.enable()
    return taken


def ratios(seconds: Mapping[str, float]) -> dict[str, float]:
    cost = {variant: s - seconds["base"] for variant, s in seconds.items()}
    found = {}
    for table, values, kind in ((COSTS, cost, "cost of "), (STEPS, seconds, "step of ")):
        for name in table:
            ours, theirs = name.split(" / ")
            found[kind + name] = round(values[ours] / values[theirs], 3)
    return found


def missed(found: Mapping[str, float], shape: str) -> dict[str, str]:
    targets = {f"cost of {k}": v for k, v in COSTS.items()} | {f"step of {k}": v for k, v in STEPS.items()}
    limits = {name: targets[name][shape] for name in found if shape in targets[name]}
    return {name: f"{found[name]} > {most}" for name, most in limits.items() if found[name] > most}


def figures(shape: str, dtype: str, rounds: int) -> dict[str, Any]:
    out, in_, rows = SHAPES[shape]
    taken = measure(out, in_, rows, DTYPES[dtype], rounds)
    kinds = {"best": min, "median": median}
    milliseconds = {kind: {variant: 1e3 * pick(t) for variant, t in taken.items()} for kind, pick in kinds.items()}
    results = {kind: ratios(values) for kind, values in milliseconds.items()}
    return {
        "rows": rows,
        "parameters at one split": check_equal_parameters(out, in_),
        "milliseconds": {k: {variant: round(t, 2) for variant, t in v.items()} for k, v in milliseconds.items()},
        "ratios": results,
        "missed": {kind: missed(found, shape) for kind, found in results.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results: dict[str, Any] = {"rounds": args.rounds, "targets": {"cost": COSTS, "step": STEPS}}
    for dtype in args.dtype or DTYPES:
        for shape in args.shape or SHAPES:
            results[f"{shape} {dtype}"] = figures(shape, dtype, args.rounds)
    whole = not (args.dtype or args.shape)
    if whole:
        report("layers", results)
    else:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
