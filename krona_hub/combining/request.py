"""The request of `combine` as a value. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from krona_hub.adapters.adapter import Adapter


@dataclass(frozen=True)
class CombineInput:
    """One adapter as given by the caller."""

    label: str  # path or Hub id; "adapter 1" for one in memory
    source: Adapter | Path
    weight: float


@dataclass(frozen=True)
class CombineRequest:
    """A requested combination, with consistent options."""

    inputs: tuple[CombineInput, ...]
    out: Path | None
    terms: int | None
    max_error: float | None
    base: str | Path | None
    format: str  # a name of FORMATS
    component: str | None
    dtype: str | None  # torch's name
    allow_loss: bool
    allow_missing: bool
    allow_base_mismatch: bool
    overwrite: bool
    dry_run: bool
