"""Benchmark extraction to 8x8 of every linear layer of the SDXL U-Net, from fp16 weights in memory, on two cores.

The measured time is all work on a layer except reading and writing: the float32 difference, its rounding noise, the
nearest sum down to that noise, and its error. Half of the layers contain two planted terms, the other half a full-rank
difference with all 64 terms above the noise. The reference is `nearest_kron`, the dense SVD of R(Δ), on one layer of
each size, scaled by the number of layers. `--share 0.05` measures one twentieth of the layers and scales the result.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from common import peak_memory, report
from torch import Tensor

from krona_hub.bases import catalog
from krona_hub.bases.module_spec import Placement
from krona_hub.bases.weight_files import WeightPlace
from krona_hub.conversion.target import ConversionTarget
from krona_hub.extraction.fit_layers import fit_difference
from krona_hub.extraction.fit_plan import FitPlan
from krona_hub.extraction.layer_difference import LayerDifference
from krona_hub.extraction.request import FitRequest
from krona_hub.extraction.tensor_pairs import LayerPair
from krona_hub.kron.from_dense import nearest_kron_of_dense
from krona_hub.kron.parallel import in_parallel
from krona_hub.kron.terms import nearest_kron

SHAPE, TERMS, CORES, TARGET = (8, 8), 2, 2, 120.0
NO_PLACE = WeightPlace(Path(), "", Placement(""))


class SampleLayer(NamedTuple):
    """A generated layer of both checkpoints."""

    pair: LayerPair
    base: Tensor
    tuned: Tensor


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--share", type=float, default=1.0)
    share = options.parse_args().share
    torch.set_num_threads(CORES)
    sizes = [m.shape for m in catalog.get("sdxl").components["unet"].values() if len(m.shape) == 2]
    dense, worst = dense_seconds(sizes)
    some = sizes[:: round(1 / share)]
    seconds, terms = ours(some)
    scale = sum(map(numbers, sizes)) / sum(map(numbers, some))
    total = seconds * scale
    figures = {"layers": len(sizes), "measured_layers": len(some), "seconds": round(total, 1), "target_seconds": TARGET}
    rest = {"dense_svd_seconds": round(dense, 1), "ratio": round(dense / total, 2), "terms_of_planted": terms}
    memory = {"worst_relative_difference_of_error": worst, "peak_memory_gb": round(peak_memory(), 2)}
    report("extract", {**figures, **rest, **memory})


def ours(sizes: list[tuple[int, ...]]) -> tuple[float, int]:
    """Return the seconds for these layers, without generating them, and the most terms found in a planted one."""
    plan = FitPlan(FitRequest(shape=SHAPE), ConversionTarget("krona"), None, CORES)
    seconds, most = 0.0, 0
    for batch in batches(sizes):
        start = perf_counter()
        fitted = [f for _, f in in_parallel(lambda layer: fit(plan, layer), batch, CORES)]
        seconds += perf_counter() - start
        most = max([most, *(f.taken.report.terms for f, layer in zip(fitted, batch, strict=True) if is_planted(layer))])
    return seconds, most


def fit(plan: FitPlan, layer: SampleLayer):
    return fit_difference(plan, layer.pair, LayerDifference.between(*layer))


def batches(sizes: list[tuple[int, ...]], batch_size: int = 8) -> Iterator[list[SampleLayer]]:
    for start in range(0, len(sizes), batch_size):
        yield [made_layer(i, size) for i, size in enumerate(sizes[start : start + batch_size], start)]


def made_layer(i: int, size: tuple[int, ...]) -> SampleLayer:
    generator = torch.Generator().manual_seed(i)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    pair = LayerPair(str(i), size, NO_PLACE, NO_PLACE)
    base = 0.02 * normal(*size)
    if is_planted(SampleLayer(pair, base, base)):
        rest = size[0] // SHAPE[0], size[1] // SHAPE[1]
        delta = 3e-4 * sum(torch.kron(normal(*SHAPE), normal(*rest)) for _ in range(TERMS))
    else:
        delta = 6e-4 * normal(*size)
    return SampleLayer(pair, base.half(), (base.half().float() + delta).half())


def is_planted(layer: SampleLayer) -> bool:
    return int(layer.pair.name) % 2 == 0


def numbers(size: tuple[int, ...]) -> int:
    return size[0] * size[1]


def dense_seconds(sizes: list[tuple[int, ...]]) -> tuple[float, float]:
    """Return the seconds of the dense SVD for all layers, and the worst relative difference between the errors."""
    total, worst = 0.0, 0.0
    for size in sorted(set(sizes)):
        weight = made_layer(1, size).base.float()
        start = perf_counter()
        best = nearest_kron(weight, SHAPE)
        total += (perf_counter() - start) * sizes.count(size)
        fit_of_ours = nearest_kron_of_dense(weight[None], SHAPE)[0]
        worst = max(worst, abs(fit_of_ours.relative_error / best.relative_error - 1))
    return total, worst


if __name__ == "__main__":
    main()
