"""Results of a merge, and how much of the adapters rounding lost. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import NamedTuple

from krona_hub.conversion.report import percent
from krona_hub.errors import counted
from krona_hub.merging.plan import AdapterPlan

MOST = 0.5  # lost share from which most of the change is noise
SOME = 0.05  # lost share above which the verdict advises another dtype
TINY = 0.001


class TensorReport(NamedTuple):
    """A tensor that adapters changed."""

    file: str  # relative to the base, if it is a folder
    tensor: str
    layers: tuple[str, ...]
    dtype: str  # in the output
    wanted: float  # ‖w·ΔW‖
    lost: float  # ‖(W′ − W) − w·ΔW‖

    @property
    def share_lost(self) -> float:
        """‖(W′ − W) − w·ΔW‖ / ‖w·ΔW‖: 0 if nothing was lost."""
        return self.lost / self.wanted if self.wanted else 0.0


@dataclass(frozen=True)
class MergeReport:
    """Result of a merge."""

    base: Path
    out: Path  # the base itself, for an in-place merge
    adapters: tuple[AdapterPlan, ...]
    tensors: tuple[TensorReport, ...]
    files: tuple[Path, ...]  # changed
    copied: int  # unchanged files
    left_out: tuple[str, ...]  # pickles and other copies of changed weights, which would be stale
    bytes_written: int
    bytes_touched: int
    seconds: float
    undo: Path | None = None
    base_sha256: str | None = None  # of a single file, if known
    notes: tuple[str, ...] = ()

    @property
    def wanted(self) -> float:
        """‖w·ΔW‖ over all tensors."""
        return sqrt(sum(t.wanted**2 for t in self.tensors))

    @property
    def share_lost(self) -> float:
        """‖effective ΔW − w·ΔW‖ / ‖w·ΔW‖ over all tensors: the share lost in rounding to the stored dtype."""
        lost = sqrt(sum(t.lost**2 for t in self.tensors))
        return lost / self.wanted if self.wanted else 0.0

    @property
    def verdict(self) -> str:
        """The result in words, with advice; what was not merged comes first."""
        missing = sum(len(adapter.missing) for adapter in self.adapters)
        words = verdict(self.share_lost, self.tensors)
        if not missing:
            return words
        rest = words.replace("contain the adapters", "contain the rest")
        return f"{counted(missing, 'part')} of the adapters not merged; {rest}"


def verdict(share_lost: float, tensors: Sequence[TensorReport]) -> str:
    """Return the verdict on the share of the change that rounding lost.

    >>> verdict(0.0, [])
    'no weights changed: every strength is 0'
    """
    if not tensors:
        return "no weights changed: every strength is 0"
    types = "/".join(sorted({t.dtype.lower() for t in tensors}))
    amount = percent(share_lost) if share_lost >= TINY else f"less than {percent(TINY)}"
    loss = f"{amount} of the adapters' change was lost in rounding to {types}"
    if share_lost <= SOME:
        return f"{loss}: the merged weights contain the adapters"
    advice = (
        "--out-dtype fp32-touched keeps all of it; --rounding stochastic keeps its strength on average, with more noise"
    )
    if share_lost < MOST:
        return f"{loss}; {advice}"
    return f"{loss}: most of the change is now noise, although sums over many weights still follow it in part; {advice}"
