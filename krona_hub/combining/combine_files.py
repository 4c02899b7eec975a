"""`combine`: read, add, recompress where asked, measure, refuse or write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from krona_hub.adapter import Adapter
from krona_hub.combining.report import CombineReport

Progress = Callable[[int, int], None]  # layers done, layers in all


def combine(
    adapters: Sequence[tuple[Adapter | str | Path, float]],
    out: str | Path | None = None,
    *,
    terms: int | None = None,
    max_error: float | None = None,
    base: str | Path | None = None,
    to: str = "krona",
    component: str | None = None,
    dtype: str | torch.dtype | None = None,
    allow_loss: bool = False,
    allow_missing: bool = False,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> CombineReport:
    """One adapter that is the weighted sum of several."""
    raise NotImplementedError
