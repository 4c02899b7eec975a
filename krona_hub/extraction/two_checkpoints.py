"""`extract`: pair, subtract, fit, measure, refuse or write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from krona_hub.extraction.report import ExtractionReport

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]  # layers done, layers in all


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path | None = None,
    *,
    shape: str | tuple[int, int] = "auto",
    terms: int | None = None,
    max_error: float | None = None,
    budget: str | int | None = None,
    shape_fallback: str | None = None,
    to: str = "krona",
    component: str | None = None,
    targets: str | Sequence[str] | None = None,
    also_vectors: bool = False,
    base_name: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    allow_loss: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> ExtractionReport:
    """The adapter that turns `base` into `tuned`."""
    raise NotImplementedError
