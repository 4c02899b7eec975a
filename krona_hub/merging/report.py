"""What a merge did, and how much of the adapters is left after rounding. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import NamedTuple

from krona_hub.merging.plan import AdapterPlan

MOST = 0.5  # share lost from which the verdict warns
SOME = 0.05
TINY = 0.001


class TensorReport(NamedTuple):
    """A tensor that adapters changed."""

    file: str  # relative to the base, where that is a folder
    tensor: str
    layers: tuple[str, ...]
    dtype: str  # that it is stored in now
    wanted: float  # ‖w·ΔW‖
    lost: float  # ‖(W′ − W) − w·ΔW‖

    @property
    def share_lost(self) -> float:
        """‖(W′ − W) − w·ΔW‖ / ‖w·ΔW‖: 0 where all of it is there."""
        return self.lost / self.wanted if self.wanted else 0.0


@dataclass(frozen=True)
class MergeReport:
    """What a merge did."""

    base: Path
    out: Path  # the base itself, where it was changed in place
    adapters: tuple[AdapterPlan, ...]
    tensors: tuple[TensorReport, ...]
    files: tuple[Path, ...]  # changed
    copied: int  # files that are as they were
    left_out: tuple[str, ...]  # pickles and other weights beside the changed ones, which would be stale
    bytes_written: int
    bytes_touched: int
    seconds: float
    undo: Path | None = None
    base_sha256: str | None = None  # of a lone file, where it is known
    notes: tuple[str, ...] = ()

    @property
    def wanted(self) -> float:
        """‖w·ΔW‖ over all tensors."""
        return sqrt(sum(t.wanted**2 for t in self.tensors))

    @property
    def share_lost(self) -> float:
        """‖effective ΔW − w·ΔW‖ / ‖w·ΔW‖ over all tensors: what rounding to the stored type took."""
        lost = sqrt(sum(t.lost**2 for t in self.tensors))
        return lost / self.wanted if self.wanted else 0.0

    @property
    def verdict(self) -> str:
        """What the numbers mean, and what may be done."""
        return verdict(self.share_lost, self.tensors)


def verdict(share_lost: float, tensors: Sequence[TensorReport]) -> str:
    """
    >>> verdict(0.0, [])
    'no weight changed: every strength is 0'
    """
    if not tensors:
        return "no weight changed: every strength is 0"
    types = "/".join(sorted({t.dtype.lower() for t in tensors}))
    amount = f"{share_lost:.1%}" if share_lost >= TINY else f"less than {TINY:.1%}"
    told = f"{amount} of the adapters' change was lost in rounding to {types}"
    if share_lost <= SOME:
        return f"{told}: the merged weights hold the adapters"
    advice = "--out-dtype fp32-touched keeps it all, --rounding stochastic its strength on average, with more noise"
    if share_lost < MOST:
        return f"{told}; {advice}"
    return f"{told}: most of it is noise now, though the sum over many weights still follows it in part; {advice}"
