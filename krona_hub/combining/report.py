"""Results of combining adapters, measured. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from krona_hub.conversion.report import LayerReport, Totals
from krona_hub.formats.forms.left_out import COMPLETE, LeftOut


@dataclass(frozen=True)
class CombinedAdapter:
    """One of the combined adapters."""

    source: str  # a path or a Hub id; "adapter 1" for one in memory
    weight: float
    format: str | None  # a name of FORMATS
    layers: int
    parameters: int
    sha256: str | None = None  # of a file; None for folders and adapters in memory
    vectors: int = 0  # of biases and norms; their numbers are part of `parameters`


@dataclass(frozen=True)
class CombineReport(Totals):
    """Result of `combine`, or of its dry run. `before` in `layers` is the exact sum, the reference of the errors."""

    parts: tuple[CombinedAdapter, ...]
    target_format: str
    out: Path | None  # None: measured only
    layers: tuple[LayerReport, ...]  # the union of the layers of all parts
    left_out: LeftOut = COMPLETE  # parts of the sum that the result does not have
    vector_error: float = 0.0  # relative, over all vectors that the result has
    notes: tuple[str, ...] = ()
    checked: str = ""  # the read-back check, in words
    written: bool = False
    files: tuple[Path, ...] = ()
    vectors: tuple[str, ...] = ()  # names of the parameters that vectors change
    vector_parameters: int = 0  # numbers in these vectors, which the totals of the layers do not count
