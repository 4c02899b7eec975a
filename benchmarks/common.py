"""Shared code of the benchmarks: a generated LoRA with the shapes of SDXL, and results written as JSON.

The SDXL U-Net has 70 transformer blocks, each with q, k, v and out in two attentions; k and v of the second one take
the 2048 channels of the text encoders. This makes 560 layers of four sizes.
"""

from __future__ import annotations

import json
import os
import platform
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.kron.shapes import KronShape, choices

RESULTS = Path(__file__).parent / "results"
SDXL_LAYERS = {(640, 640): 60, (640, 2048): 20, (1280, 1280): 360, (1280, 2048): 120}  # (out, in): number of layers
RANK = 16
NOISE = 0.01  # relative noise of the factors of a planted layer: ΔW differs from the planted sum by about 0.014
DECAY = 0.9  # of the singular values of a plain layer


class Layer(NamedTuple):
    up: Tensor  # (out, r)
    down: Tensor  # (r, in)
    planted: tuple[KronShape, int, int] | None  # shape, terms, rank of B; None for a plain LoRA


def sdxl_lora(share: float = 1.0, seed: int = 0) -> Iterator[Layer]:
    """Yield the layers of the generated LoRA, or a `share` of each size; every second layer contains a planted sum."""
    generator = torch.Generator().manual_seed(seed)
    for (out, in_), count in SDXL_LAYERS.items():
        for i in range(max(2, round(count * share))):
            yield (planted if i % 2 else plain)(out, in_, generator)


def plain(out: int, in_: int, generator: torch.Generator) -> Layer:
    """Return Gaussian factors whose singular values decay slowly, like those of trained LoRAs."""
    up, down = torch.randn(out, RANK, generator=generator), torch.randn(RANK, in_, generator=generator)
    return Layer(0.01 * up * DECAY ** torch.arange(RANK), down, None)


def planted(out: int, in_: int, generator: torch.Generator) -> Layer:
    """Return two to six terms A ⊗ B with low-rank A and B, of rank 16 at most in total, with noise in the factors."""
    terms, a_rank, b_rank = _choice([(2, 1, 8), (2, 2, 4), (3, 1, 5), (4, 1, 4), (4, 2, 2), (6, 1, 2)], generator)
    lora = RANK * (out + in_)
    fits = [s for s in choices(out, in_) if min(s) > 2 and 4 * terms * _smallest_term(s, b_rank) < 3 * lora]
    shape = _choice(fits, generator)
    ups, downs = [], []
    for _ in range(terms):
        a, b = _low_rank(shape.a1, shape.a2, a_rank, generator), _low_rank(shape.b1, shape.b2, b_rank, generator)
        ups.append(torch.kron(a[0], b[0]))
        downs.append(torch.kron(a[1], b[1]))
    up, down = _padded(torch.cat(ups, 1), 1), _padded(torch.cat(downs), 0)
    return Layer(_noisy(up, generator) * 0.01, _noisy(down, generator), (shape, terms, b_rank))


def timed(work: Callable[[], object], repeat: int = 1) -> float:
    """Return the shortest of `repeat` runs, in seconds."""

    def once() -> float:
        start = perf_counter()
        work()
        return perf_counter() - start

    return min(once() for _ in range(repeat))


def peak_memory() -> float:
    """Return the peak memory of this process, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def report(name: str, figures: dict[str, object]) -> None:
    """Print the figures and write them, together with the machine, to results/<name>.json."""
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    figures = {**figures, "machine": {**machine, "python": platform.python_version()}}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n")
    for key, value in figures.items():
        print(f"{key}: {value}")


def _choice(options: list, generator: torch.Generator):
    return options[int(torch.randint(len(options), (), generator=generator))]


def _smallest_term(s: KronShape, b_rank: int) -> int:
    return s.a1 * s.a2 + min(s.b1 * s.b2, b_rank * (s.b1 + s.b2))


def _low_rank(p: int, q: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rank = min(p, q, rank)
    return torch.randn(p, rank, generator=generator), torch.randn(rank, q, generator=generator)


def _padded(factor: Tensor, axis: int) -> Tensor:
    """Pad a factor with zeros to the rank of the file."""
    missing = RANK - factor.shape[axis]
    size = [missing if i == axis else n for i, n in enumerate(factor.shape)]
    return torch.cat([factor, torch.zeros(size)], axis)


def _noisy(factor: Tensor, generator: torch.Generator) -> Tensor:
    return factor + NOISE * factor.square().mean().sqrt() * torch.randn(factor.shape, generator=generator)
