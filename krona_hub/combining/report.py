"""What combining adapters did, measured. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from krona_hub.conversion.report import LayerReport, Totals


@dataclass(frozen=True)
class CombinedAdapter:
    """One adapter that went in."""

    source: str  # a path or a Hub id; "adapter 1" for one in memory
    weight: float
    format: str | None  # a name of FORMATS
    layers: int
    parameters: int
    sha256: str | None = None  # of a file; None for folders and adapters in memory


@dataclass(frozen=True)
class CombineReport(Totals):
    """What `combine` did, or would do. In `layers`, "before" is the exact sum of the parts; errors are against it."""

    parts: tuple[CombinedAdapter, ...]
    target_format: str
    out: Path | None  # None where nothing was to be written
    layers: tuple[LayerReport, ...]  # the union of the layers of all parts
    notes: tuple[str, ...] = ()
    checked: str = ""  # the read-back check, in words
    written: bool = False
    files: tuple[Path, ...] = ()
