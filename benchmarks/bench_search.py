"""Benchmark the search of `convert --max-error 0.05` on a complete SDXL-shaped rank-16 LoRA: time and peak memory.

Half of the 560 layers contain planted Kronecker sums with noise. An unpruned dense search over all shapes would need
the SVD of about 150,000 matrices.
"""

from __future__ import annotations

import sys
from collections import Counter
from time import process_time

from common import peak_memory, report, sdxl_lora, timed

from krona_hub.kron.factorization_search import Choice, smallest_within

MAX_ERROR = 0.05


def main() -> None:
    layers = list(sdxl_lora())
    before = peak_memory()
    found: list[Choice] = []
    pairs = [(layer.up, layer.down) for layer in layers]
    cpu = process_time()
    seconds = timed(lambda: found.extend(smallest_within(pairs, MAX_ERROR, progress=show)))
    print(file=sys.stderr)
    planted = [(layer, choice.form) for layer, choice in zip(layers, found, strict=True) if layer.planted]
    kept = Counter("the LoRA itself" if choice.form.is_lora else "a Kronecker sum" for choice in found)
    figures = {
        "layers": len(layers),
        "max_error": MAX_ERROR,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(process_time() - cpu, 1),
        "peak_gb": round(peak_memory(), 2),
        "peak_gb_before": round(before, 2),
        "chosen": dict(kept),
        "planted": len(planted),
        "planted_shape_chosen": sum(form.shape == layer.planted[0] for layer, form in planted if layer.planted),
        "parameters_before": sum(layer.up.numel() + layer.down.numel() for layer in layers),
        "parameters_after": sum(choice.form.parameters for choice in found),
        "worst_error": max(choice.form.relative_error for choice in found),
    }
    report("search", figures)


def show(done: int, total: int) -> None:
    print(f"\r{done}/{total}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
