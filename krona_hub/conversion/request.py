"""The request of `convert` as a value. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from krona_hub.conversion.methods import Method

if TYPE_CHECKING:
    from krona_hub.adapters.moments import Moments


@dataclass(frozen=True)
class ConvertRequest:
    """A requested conversion, with consistent options."""

    source: str  # as given by the caller
    path: Path
    out: Path | None
    method: Method | None
    to: str | None  # a name of FORMATS
    tool: str | None
    base: str | Path | None
    from_format: str | None
    component: str | None
    dtype: str | None  # torch's name
    allow_loss: bool
    allow_missing: bool
    overwrite: bool
    split_qkv: bool
    dry_run: bool
    moments: Moments | None = None  # of the source
    gain: float = 1.0  # factor on all layers, with moments
