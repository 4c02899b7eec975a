"""`verify`: three questions about checkpoints and adapters. Torch-free until numbers are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from krona_hub.aliases import Progress
from krona_hub.errors import UsageError
from krona_hub.verification.report import VerifyReport

if TYPE_CHECKING:
    from krona_hub.adapters.adapter import Adapter


_QUESTIONS = (
    "Ask one of three: MERGED --base BASE --adapter A[:w] (does it contain exactly that), A B (the same ΔW), "
    "A --base BASE (does it fit)."
)


def verify(
    first: str | Path,
    second: str | Path | None = None,
    *,
    base: str | Path | None = None,
    adapters: Sequence[tuple[Adapter | str | Path, float]] = (),
    tolerance: float = 1e-5,
    exact: bool = False,
    component: str | None = None,
    block_weights: Mapping[str, float] | None = None,
    allow_missing: bool = False,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare, and say what differs.

    verify(MERGED, base=BASE, adapters=[(A, w), …])   MergeCheck   is it round(base + Σ w·ΔW), to one unit at most?
    verify(A, B)                                      DeltaCheck   the same ΔW, within `tolerance` per layer?
    verify(A, base=BASE)                              FitCheck     has the base these layers? From headers alone.

    `exact` allows no unit in the last place; `block_weights` are those of `merge`; `tolerance` is relative,
    Frobenius; `base` beside two adapters settles names and gives the weights that DoRA needs. A difference is an
    answer and no error: the report has `same`, `exit_code` and the numbers. Raises UsageError for arguments that ask
    none of the three.
    """
    if not (isfinite(tolerance) and tolerance >= 0):
        raise UsageError(f"a tolerance of {tolerance} means nothing.", fix="Give a number from 0 up, such as 1e-5.")
    if adapters and second is None and base is not None:
        from krona_hub.verification.check_merge import contains

        return contains(
            first,
            base,
            adapters,
            exact=exact,
            component=component,
            block_weights=block_weights,
            allow_missing=allow_missing,
            progress=progress,
        )
    if second is not None and not adapters:
        from krona_hub.verification.compare_adapters import same_delta

        return same_delta(first, second, base, tolerance, component, allow_missing, progress)
    if base is not None and not adapters:
        from krona_hub.verification.check_fit import fits

        return fits(first, base, component)
    raise UsageError("this asks nothing that can be verified.", fix=_QUESTIONS)
