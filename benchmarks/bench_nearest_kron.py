"""Benchmark converting a LoRA to one 64x8 term per layer through the factors, against the dense SVD of R(ΔW).

Our method is timed on all 560 layers of an SDXL-shaped rank-16 LoRA; the dense SVD (float32, with vectors) on a few
layers of each size and kind, scaled by the number of layers. Both run on one core, so that the ratio is valid on a
busy machine, too.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from common import SDXL_LAYERS, Layer, report, sdxl_lora, timed

from krona_hub.kron.from_lora import nearest_kron_of_loras
from krona_hub.kron.shapes import split
from krona_hub.kron.terms import KronFit, rearrange

SHAPE, SAMPLE = (64, 8), 4  # layers of each size, alternating between planted and plain


def main() -> None:
    torch.set_num_threads(1)
    by_size: dict[tuple[int, int], list[Layer]] = defaultdict(list)
    for layer in sdxl_lora():
        by_size[layer.up.shape[0], layer.down.shape[1]].append(layer)
    ours, dense, worst = 0.0, 0.0, 0.0
    for size, layers in by_size.items():
        dense += len(layers) / SAMPLE * sum(min(dense_seconds(layer) for _ in range(2)) for layer in layers[:SAMPLE])
        ours += timed(lambda layers=layers: convert(layers), repeat=2)
        worst = max(worst, *(difference(*pair) for pair in zip(layers[:SAMPLE], convert(layers), strict=False)))
        print(f"{size}: ours {ours:.2f} s, dense {dense:.1f} s so far")
    figures = {"layers": sum(SDXL_LAYERS.values()), "ours_seconds": round(ours, 2), "dense_seconds": round(dense, 1)}
    report("nearest_kron", {**figures, "ratio": round(dense / ours, 1), "worst_relative_difference_of_error": worst})


def convert(layers: list[Layer]) -> list[KronFit]:
    return nearest_kron_of_loras([x.up for x in layers], [x.down for x in layers], SHAPE)


def dense_seconds(layer: Layer) -> float:
    r = rearrange(layer.up @ layer.down, split((layer.up.shape[0], layer.down.shape[1]), *SHAPE))
    return timed(lambda: torch.linalg.svd(r, full_matrices=False))


def difference(layer: Layer, fit: KronFit) -> float:
    """Return the relative difference of the reported error from that of a dense float64 reference."""
    w = layer.up.double() @ layer.down.double()
    sigma = torch.linalg.svdvals(rearrange(w, fit.terms.shape))
    return abs(fit.relative_error / float(sigma[1:].norm() / sigma.norm()) - 1)


if __name__ == "__main__":
    main()
