"""Benchmark up to which size it is faster to form the weight of a layer, with training steps of one layer.

    python benchmarks/bench_formed.py

Runs forward and backward of KronLinear in float32 on one thread, alternating between W + ΔW and the chain of products
of `layers.contraction`. Reports process CPU time without that of the bare layer, best of the rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from time import process_time
from unittest.mock import patch

import torch
from common import report
from torch import Tensor, nn

from krona_hub import KronLinear
from krona_hub.layers import kron_linear

SIZES = [  # rows of x, out, in
    (64, 80, 80), (320, 80, 80), (80, 128, 128), (1024, 160, 160), (64, 320, 320), (1024, 320, 320), (77, 320, 768),
    (64, 640, 640), (1024, 640, 640), (256, 1280, 1280),
]  # fmt: skip
SHAPES = ((8, 8), (16, 4), (64, 4))
VARIANTS = {"formed": 2**62, "chain": 0}
ROUNDS, WORK = 7, 2e8  # multiply-adds of the bare layer per round


def main() -> None:
    torch.set_num_threads(1)
    rows = [
        _row(n, out, in_, shape) for n, out, in_ in SIZES for shape in SHAPES if out % shape[0] == in_ % shape[1] == 0
    ]
    right = sum((row["formed / chain"] < 1) == (row["weight"] <= kron_linear.SMALL) for row in rows)
    report(
        "formed",
        {"layers": rows, "limit": kron_linear.SMALL, "the limit chooses the faster": f"{right} of {len(rows)}"},
    )


def _row(n: int, out: int, in_: int, shape: tuple[int, int]) -> dict[str, object]:
    bare = nn.Linear(in_, out).requires_grad_(False)
    layer, x = KronLinear(nn.Linear(in_, out).requires_grad_(False), shape=shape), torch.randn(n, in_)
    steps = max(4, int(WORK / (n * out * in_)))
    taken: dict[str, list[float]] = {"bare": [], **{variant: [] for variant in VARIANTS}}
    for _ in range(ROUNDS):
        taken["bare"].append(_seconds(bare, x, steps))
        for variant, limit in VARIANTS.items():
            with patch.object(kron_linear, "SMALL", limit):
                taken[variant].append(_seconds(layer, x, steps))
    best = {variant: min(found) for variant, found in taken.items()}
    added = {variant: best[variant] - best["bare"] for variant in VARIANTS}
    found = {f"{variant}, µs": round(1e6 * seconds, 1) for variant, seconds in added.items()}
    case = {"rows": n, "out": out, "in": in_, "shape": f"{shape[0]}x{shape[1]}", "weight": out * in_}
    return case | found | {"formed / chain": round(added["formed"] / added["chain"], 2)}


def _seconds(layer: Callable[[Tensor], Tensor], x: Tensor, steps: int) -> float:
    """Return the CPU seconds of one step."""
    x = x.clone().requires_grad_()
    start = process_time()
    for _ in range(steps):
        out = layer(x)
        out.backward(out.detach())
        x.grad = None
    return (process_time() - start) / steps


if __name__ == "__main__":
    main()
