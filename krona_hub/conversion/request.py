"""What `convert` is asked for, as a value. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from krona_hub.conversion.methods import Method


@dataclass(frozen=True)
class ConvertRequest:
    """A conversion that was asked for, with options that make sense together."""

    source: str  # as the caller named it
    path: Path
    out: Path | None
    method: Method | None
    to: str | None  # a name of FORMATS
    tool: str | None
    base: str | Path | None
    from_format: str | None
    component: str | None
    dtype: str | None  # as torch calls it
    allow_loss: bool
    allow_missing: bool
    overwrite: bool
    split_qkv: bool
    dry_run: bool
