"""Forward and backward of one linear layer with an adapter, against PEFT and LyCORIS, side by side in one process.

One thread and its process CPU time, the ways in turn in every round, each round from another one on, and the fastest of
a few steps of each, as other programs disturb steps this short; the best and the median of the nine rounds. The cost
of an adapter is its step less that of the bare layer, whose input needs a gradient and whose weight is frozen. The
ways of one split (8x8, w2 whole) have equal parameters; 64x4 has fewer, and PEFT's LoRA of rank 4 more than 64x4.
`--dtype float32`, `--rounds N` and `--shape 640x640` make it shorter: bfloat16 is slow on a CPU that does not know it.
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
from layer_peers import WAYS, build, check_equal_parameters
from torch import Tensor, nn

SHAPES = {"1280x1280": (1280, 1280, 1024), "640x640": (640, 640, 4096), "1280x2048": (1280, 2048, 77)}  # out, in, N
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SECONDS_PER_ROUND = 0.5  # of each way, and at most MOST steps
MOST = 20
# ours / theirs: the most allowed, for each shape where it is asked
COSTS = {
    "krona 8x8 / peft lokr": {"1280x1280": 0.2, "640x640": 0.5},
    "krona 8x8 / lycoris bypass": dict.fromkeys(SHAPES, 1.15),
    "krona 64x4 / lycoris bypass": dict.fromkeys(SHAPES, 0.75),
}
STEPS = {"krona 64x4 / peft lora r=4": dict.fromkeys(SHAPES, 1.15)}


def fastest(layer: nn.Module, x: Tensor, g: Tensor, steps: int) -> float:
    return min(step(layer, x, g) for _ in range(steps))


def step(layer: nn.Module, x: Tensor, g: Tensor) -> float:
    """Seconds of one forward and backward pass, with the gradients of the step before dropped."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    start = process_time()
    layer(x).backward(g)
    return process_time() - start


def measure(out: int, in_: int, rows: int, dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    layers = {way: build(way, out, in_).to(dtype) for way in WAYS}
    x = torch.randn(1, rows, in_, dtype=dtype, requires_grad=True)
    g = torch.randn(1, rows, out, dtype=dtype)
    first = [step(layer, x, g) for layer in layers.values()]
    steps = max(1, min(MOST, round(SECONDS_PER_ROUND / min(first))))
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    gc.disable()
    for i in range(rounds):
        order = deque(WAYS)
        order.rotate(-i)
        for way in order:
            taken[way].append(fastest(layers[way], x, g, steps))
    gc.enable()
    return taken


def ratios(seconds: Mapping[str, float]) -> dict[str, float]:
    cost = {way: s - seconds["base"] for way, s in seconds.items()}
    found = {}
    for table, values, kind in ((COSTS, cost, "cost of "), (STEPS, seconds, "step of ")):
        for name in table:
            ours, theirs = name.split(" / ")
            found[kind + name] = round(values[ours] / values[theirs], 3)
    return found


def missed(found: Mapping[str, float], shape: str) -> dict[str, str]:
    targets = {f"cost of {k}": v for k, v in COSTS.items()} | {f"step of {k}": v for k, v in STEPS.items()}
    asked = {name: targets[name][shape] for name in found if shape in targets[name]}
    return {name: f"{found[name]} > {most}" for name, most in asked.items() if found[name] > most}


def figures(shape: str, dtype: str, rounds: int) -> dict[str, Any]:
    out, in_, rows = SHAPES[shape]
    taken = measure(out, in_, rows, DTYPES[dtype], rounds)
    kinds = {"best": min, "median": median}
    milliseconds = {kind: {way: 1e3 * pick(t) for way, t in taken.items()} for kind, pick in kinds.items()}
    made = {kind: ratios(values) for kind, values in milliseconds.items()}
    return {
        "rows": rows,
        "parameters at one split": check_equal_parameters(out, in_),
        "milliseconds": {k: {way: round(t, 2) for way, t in v.items()} for k, v in milliseconds.items()},
        "ratios": made,
        "missed": {kind: missed(found, shape) for kind, found in made.items()},
    }


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--dtype", choices=DTYPES, action="append")
    options.add_argument("--shape", choices=SHAPES, action="append")
    given = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made: dict[str, Any] = {"rounds": given.rounds, "targets": {"cost": COSTS, "step": STEPS}}
    for dtype in given.dtype or DTYPES:
        for shape in given.shape or SHAPES:
            made[f"{shape} {dtype}"] = figures(shape, dtype, given.rounds)
    whole = not (given.dtype or given.shape)
    if whole:
        report("layers", made)
    else:
        print(json.dumps(made, indent=2))


if __name__ == "__main__":
    main()
