"""What combining adapters did, measured. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from krona_hub.conversion.report import LayerReport, total_error, verdict


@dataclass(frozen=True)
class Part:
    """One adapter that went in."""

    source: str  # a path or a Hub id; "adapter 1" for one in memory
    weight: float
    format: str | None  # a name of FORMATS
    layers: int
    parameters: int
    sha256: str | None = None  # of a file; None for folders and adapters in memory


@dataclass(frozen=True)
class CombineReport:
    """What `combine` did, or would do. In `layers`, "before" is the exact sum of the parts."""

    parts: tuple[Part, ...]
    target_format: str
    out: Path | None  # None where nothing was to be written
    layers: tuple[LayerReport, ...]  # the union of the layers of all parts
    notes: tuple[str, ...] = ()
    checked: str = ""  # the read-back check, in words
    written: bool = False
    files: tuple[Path, ...] = ()

    @property
    def parameters_before(self) -> int:
        """Of the exact sum."""
        return sum(x.parameters_before for x in self.layers)

    @property
    def parameters_after(self) -> int:
        return sum(x.parameters_after for x in self.layers)

    @property
    def bytes_before(self) -> int:
        return sum(x.bytes_before for x in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(x.bytes_after for x in self.layers)

    @property
    def relative_error(self) -> float:
        """Against the exact sum, over all layers together; 0.0 where nothing was recompressed or cast."""
        return total_error(self.layers)

    @property
    def energy_kept(self) -> float:
        """1 − relative_error²: the share of ‖ΔW‖² that is still there, for an orthogonal projection."""
        return max(0.0, 1 - self.relative_error**2)

    @property
    def verdict(self) -> str:
        return verdict(self)
