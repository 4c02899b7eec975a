"""What the benchmarks share: a LoRA shaped like one of SDXL, generated, and figures written as JSON.

SDXL's UNet has 70 transformer blocks, each with q, k, v and out in two attentions; k and v of the second take the
text encoder's 2048 channels. That is 560 layers of four sizes.
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
SDXL_LAYERS = {(640, 640): 60, (640, 2048): 20, (1280, 1280): 360, (1280, 2048): 120}  # (out, in): how many
RANK = 16
NOISE = 0.01  # of every factor of a planted layer, relative: ΔW is then about 0.014 away from the planted sum
DECAY = 0.9  # of the singular values of a layer that nothing is planted in


class Layer(NamedTuple):
    up: Tensor  # (out, r)
    down: Tensor  # (r, in)
    planted: tuple[KronShape, int, int] | None  # shape, terms, rank of B; None for a plain LoRA


def sdxl_lora(share: float = 1.0, seed: int = 0) -> Iterator[Layer]:
    """The layers of the generated LoRA, or of an evenly thinned `share` of it; every second one holds a planted sum."""
    generator = torch.Generator().manual_seed(seed)
    for (out, in_), count in SDXL_LAYERS.items():
        for i in range(max(2, round(count * share))):
            yield (planted if i % 2 else plain)(out, in_, generator)


def plain(out: int, in_: int, generator: torch.Generator) -> Layer:
    """Gaussian factors whose singular values decay gently, as those of trained LoRAs do."""
    up, down = torch.randn(out, RANK, generator=generator), torch.randn(RANK, in_, generator=generator)
    return Layer(0.01 * up * DECAY ** torch.arange(RANK), down, None)


def planted(out: int, in_: int, generator: torch.Generator) -> Layer:
    """Two to six terms A ⊗ B with thin A and B, so that all of it has rank 16 at most, and noise in the factors."""
    terms, a_rank, b_rank = _draw([(2, 1, 8), (2, 2, 4), (3, 1, 5), (4, 1, 4), (4, 2, 2), (6, 1, 2)], generator)
    lora = RANK * (out + in_)
    fits = [s for s in choices(out, in_) if min(s) > 2 and 4 * terms * _smallest_term(s, b_rank) < 3 * lora]
    shape = _draw(fits, generator)
    ups, downs = [], []
    for _ in range(terms):
        a, b = _thin(shape.a1, shape.a2, a_rank, generator), _thin(shape.b1, shape.b2, b_rank, generator)
        ups.append(torch.kron(a[0], b[0]))
        downs.append(torch.kron(a[1], b[1]))
    up, down = _padded(torch.cat(ups, 1), 1), _padded(torch.cat(downs), 0)
    return Layer(_noisy(up, generator) * 0.01, _noisy(down, generator), (shape, terms, b_rank))


def timed(work: Callable[[], object], repeat: int = 1) -> float:
    """The shortest of `repeat` runs, in seconds."""

    def once() -> float:
        start = perf_counter()
        work()
        return perf_counter() - start

    return min(once() for _ in range(repeat))


def peak_memory() -> float:
    """The most memory this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def report(name: str, figures: dict[str, object]) -> None:
    """Print the figures and write them, with what they were measured on, to results/<name>.json."""
    machine = {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    figures = {**figures, "machine": {**machine, "python": platform.python_version()}}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n")
    for key, value in figures.items():
        print(f"{key}: {value}")


def _draw(options: list, generator: torch.Generator):
    return options[int(torch.randint(len(options), (), generator=generator))]


def _smallest_term(s: KronShape, b_rank: int) -> int:
    return s.a1 * s.a2 + min(s.b1 * s.b2, b_rank * (s.b1 + s.b2))


def _thin(p: int, q: int, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rank = min(p, q, rank)
    return torch.randn(p, rank, generator=generator), torch.randn(rank, q, generator=generator)


def _padded(factor: Tensor, axis: int) -> Tensor:
    """Zeros up to the rank of the file."""
    missing = RANK - factor.shape[axis]
    size = [missing if i == axis else n for i, n in enumerate(factor.shape)]
    return torch.cat([factor, torch.zeros(size)], axis)


def _noisy(factor: Tensor, generator: torch.Generator) -> Tensor:
    return factor + NOISE * factor.square().mean().sqrt() * torch.randn(factor.shape, generator=generator)
