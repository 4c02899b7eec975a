"""Up to which size it is better to form the weight of a layer: a training step of one layer, both ways in turn.

    python benchmarks/bench_formed.py

Forward and backward of KronLinear in float32 on one thread, through W + ΔW and through the chain of products of
`layers.contraction`; process CPU time, what the bare layer takes is subtracted. Best of the rounds.
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
WAYS = {"formed": 2**62, "chain": 0}
ROUNDS, WORK = 7, 2e8  # multiply-adds of the bare layer in a round


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
    times = max(4, int(WORK / (n * out * in_)))
    taken: dict[str, list[float]] = {"bare": [], **{way: [] for way in WAYS}}
    for _ in range(ROUNDS):
        taken["bare"].append(_seconds(bare, x, times))
        for way, limit in WAYS.items():
            with patch.object(kron_linear, "SMALL", limit):
                taken[way].append(_seconds(layer, x, times))
    best = {way: min(found) for way, found in taken.items()}
    added = {way: best[way] - best["bare"] for way in WAYS}
    found = {f"{way}, µs": round(1e6 * seconds, 1) for way, seconds in added.items()}
    about = {"rows": n, "out": out, "in": in_, "shape": f"{shape[0]}x{shape[1]}", "weight": out * in_}
    return about | found | {"formed / chain": round(added["formed"] / added["chain"], 2)}


def _seconds(layer: Callable[[Tensor], Tensor], x: Tensor, times: int) -> float:
    """Of one step."""
    x = x.clone().requires_grad_()
    start = process_time()
    for _ in range(times):
        out = layer(x)
        out.backward(out.detach())
        x.grad = None
    return (process_time() - start) / times


if __name__ == "__main__":
    main()
