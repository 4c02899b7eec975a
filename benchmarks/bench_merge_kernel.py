"""Benchmark adding an adapter to one stored tensor in memory on one thread, in nanoseconds per element.

The tensors are those of an SDXL U-Net. Nothing is read or written: this is the cost that merging adds to a copy.
`least` in the results is the minimum of any merge, on the same tensors in the same run: converting to float32, adding,
and converting back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from common import report
from torch import Tensor

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.bases.module_spec import Placement
from krona_hub.kron.parallel import one_thread
from krona_hub.kron.terms import KronTerms, as_lora
from krona_hub.merging.arithmetic.patches import Patch
from krona_hub.merging.arithmetic.rounding import Rounding
from krona_hub.merging.arithmetic.tiles import merge_tensor

Size = tuple[int, int]


def kron(size: Size, a1: int, a2: int, terms: int = 1) -> KronTerms:
    left = torch.randn(terms, a1, a2)
    return KronTerms(left, 1e-3 * torch.randn(terms, size[0] // a1, size[1] // a2))


def lora(size: Size, rank: int) -> KronTerms:
    return as_lora(torch.randn(size[0], rank).half(), (1e-3 * torch.randn(rank, size[1])).half())


def shuffled(size: Size, a1: int, a2: int) -> KronTerms:
    s = kron(size, a1, a2)
    return KronTerms(s.left, s.right, "shuffled")


ATTENTION, FEED_FORWARD, SMALL = (1280, 1280), (10240, 1280), (640, 640)
CASES: dict[str, tuple[Size, Callable[[Size], Sequence[KronTerms]]]] = {
    "64x4, 1 term": (ATTENTION, lambda n: [kron(n, 64, 4)]),
    "64x4, 1 term, 640x640": (SMALL, lambda n: [kron(n, 64, 4)]),
    "64x4, 1 term, 10240x1280": (FEED_FORWARD, lambda n: [kron(n, 64, 4)]),
    "64x4, 4 terms": (ATTENTION, lambda n: [kron(n, 64, 4, 4)]),
    "64x4, 16 terms": (ATTENTION, lambda n: [kron(n, 64, 4, 16)]),
    "8x8, 1 term": (ATTENTION, lambda n: [kron(n, 8, 8)]),
    "32x32, 1 term": (ATTENTION, lambda n: [kron(n, 32, 32)]),
    "4x640: B has 2 columns": (ATTENTION, lambda n: [kron(n, 4, 640)]),
    "320x320: B is 4x4": (ATTENTION, lambda n: [kron(n, 320, 320)]),
    "1280x320: B is 1x4": (ATTENTION, lambda n: [kron(n, 1280, 320)]),
    "1280x1280: B is 1x1": (ATTENTION, lambda n: [kron(n, 1280, 1280)]),
    "640x160: B is 2x8": (ATTENTION, lambda n: [kron(n, 640, 160)]),
    "1x1280: a column times a row": (ATTENTION, lambda n: [kron(n, 1, 1280)]),
    "1280x1, 16 terms": (ATTENTION, lambda n: [kron(n, 1280, 1, 16)]),
    "shuffled 16x4": (ATTENTION, lambda n: [shuffled(n, 16, 4)]),
    "LoRA of rank 4": (ATTENTION, lambda n: [lora(n, 4)]),
    "LoRA of rank 16": (ATTENTION, lambda n: [lora(n, 16)]),
    "LoRA of rank 16, 10240x1280": (FEED_FORWARD, lambda n: [lora(n, 16)]),
    "LoRA of rank 64": (ATTENTION, lambda n: [lora(n, 64)]),
    "64x4 and a LoRA of rank 16": (ATTENTION, lambda n: [kron(n, 64, 4), lora(n, 16)]),
}


def measured(size: Size, sums: Sequence[KronTerms], dtype: torch.dtype, rounding: Rounding, magnitude: bool) -> float:
    """Return the ns per element of one merge, best of several."""
    weights = [torch.randn(size).to(dtype) for _ in range(4)]
    m = torch.ones(size[0]) if magnitude else None
    patches = [Patch(LayerDelta(tuple(sums), size, m), 0.8, Placement("unet.x"))]

    def sink(first: int, tile: Tensor) -> None:
        pass

    def merge(weight: Tensor) -> float:
        start = time.thread_time()
        merge_tensor(weight, patches, sink, out_dtype=dtype, rounding=rounding, name="x")
        return time.thread_time() - start

    best = min(merge(weight) for _ in range(5) for weight in weights)
    return round(best / weights[0].numel() * 1e9, 2)


def lower_bound() -> float:
    """Return the ns per element of widening, adding and rounding, in tiles that stay in the cache."""
    stored, wide, delta = torch.randn(1 << 18).half(), torch.empty(1 << 18), torch.randn(1 << 18)

    def once() -> float:
        start = time.thread_time()
        stored.copy_(wide.copy_(stored).add_(delta))
        return time.thread_time() - start

    return round(min(once() for _ in range(200)) / stored.numel() * 1e9, 2)


def main() -> None:
    torch.manual_seed(0)
    size, sums = ATTENTION, [kron(ATTENTION, 64, 4)]
    with one_thread():
        bare = lower_bound()
        figures = {name: measured(n, make(n), torch.float16, Rounding(), False) for name, (n, make) in CASES.items()}
        for dtype in (torch.bfloat16, torch.float32):
            figures[f"64x4, {str(dtype).removeprefix('torch.')}"] = measured(size, sums, dtype, Rounding(), False)
        for name, rounding in {"stochastic": Rounding("stochastic"), "exact": Rounding(exact=True)}.items():
            figures[f"64x4, {name} rounding"] = measured(size, sums, torch.float16, rounding, False)
        figures["64x4, DoRA"] = measured(size, sums, torch.float16, Rounding(), True)
    report("merge_kernel", {"least (ns per number)": bare, "ns per number": figures})


if __name__ == "__main__":
    main()
