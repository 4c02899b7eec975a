"""`verify`: three questions about checkpoints and adapters. Torch-free until numbers are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from krona_hub.verification.report import VerifyReport

if TYPE_CHECKING:
    from krona_hub.adapter import Adapter

Progress = Callable[[int, int], None]  # bytes compared, bytes in all (layers, for two adapters)


def verify(
    first: str | Path,
    second: str | Path | None = None,
    *,
    base: str | Path | None = None,
    adapters: Sequence[tuple[Adapter | str | Path, float]] = (),
    tolerance: float = 1e-5,
    exact: bool = False,
    component: str | None = None,
    allow_missing: bool = False,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare, and say what differs.

    verify(MERGED, base=BASE, adapters=[(A, w), …])   MergeCheck   is it round(base + Σ w·ΔW), to one unit at most?
    verify(A, B)                                      DeltaCheck   the same ΔW, within `tolerance` per layer?
    verify(A, base=BASE)                              FitCheck     has the base these layers? From headers alone.

    `exact` allows no unit in the last place.
    """
    raise NotImplementedError
