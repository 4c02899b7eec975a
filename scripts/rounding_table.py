"""Measure the rounding loss of an adapter for the table in docs/merging.md.

Merges a LoRA of rank 16 into a 1280x1280 weight with the standard deviation of attention projections, stored in half
precision, at strengths that make ‖ΔW‖ a given share of ‖W‖.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.bases.module_spec import Placement
from krona_hub.kron.terms import as_lora
from krona_hub.merging.arithmetic.patches import Patch
from krona_hub.merging.arithmetic.rounding import Rounding
from krona_hub.merging.arithmetic.tiles import merge_tensor
from scripts.make_demo_adapter import normal

SIZE, RANK, SPREAD, SEED = 1280, 16, 0.04, 8
RATIOS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)  # ‖ΔW‖ / ‖W‖
CASES = (
    ("float16", torch.float16, "nearest"),
    ("bfloat16", torch.bfloat16, "nearest"),
    ("bfloat16, stochastic", torch.bfloat16, "stochastic"),
)


def rounding_table() -> str:
    """Return the table with one row per ratio and, for each case, the loss and the strength that was merged."""
    heads = " | ".join(f"{title}: lost | strength" for title, _, _ in CASES)
    lines = [f"| ‖ΔW‖ / ‖W‖ | {heads} |", "|---:|" + "---:|" * (2 * len(CASES))]
    random = np.random.RandomState(SEED)
    weight = torch.from_numpy(normal(random, SIZE, SIZE)) * SPREAD
    up, down = torch.from_numpy(normal(random, SIZE, RANK)), torch.from_numpy(normal(random, RANK, SIZE))
    for ratio in RATIOS:
        cells = [cell for _, dtype, mode in CASES for cell in _measured(weight.to(dtype), up, down, ratio, mode)]
        lines.append(f"| {ratio:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _measured(weight: Tensor, up: Tensor, down: Tensor, ratio: float, mode: str) -> Iterator[str]:
    """Yield ‖(W′ − W) − ΔW‖ / ‖ΔW‖ and ⟨W′ − W, ΔW⟩ / ‖ΔW‖²."""
    delta = up @ down
    strength = ratio * float(weight.float().norm() / delta.norm())
    patch = Patch(LayerDelta((as_lora(up, down),), (SIZE, SIZE)), strength, Placement("layer"))
    merged = torch.empty(SIZE * SIZE, dtype=weight.dtype)

    def keep(first: int, tile: Tensor) -> None:
        merged[first : first + len(tile)] = tile

    survival = merge_tensor(weight, [patch], keep, out_dtype=weight.dtype, rounding=Rounding(mode), name="layer")
    effective, wanted = merged.reshape(SIZE, SIZE).double() - weight.double(), strength * delta.double()
    yield f"{100 * survival.share:.2g} %" if survival.share < 0.995 else f"{100 * survival.share:.0f} %"
    yield f"{float((effective * wanted).sum() / (wanted * wanted).sum()):.2f}"
