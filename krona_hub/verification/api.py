"""`verify`: three comparisons of checkpoints and adapters. Torch-free until weights are compared."""

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


_USAGE = (
    "Use one of: MERGED --base BASE --adapter A[:strength] (contains exactly these), A B (same ΔW), A --base BASE "
    "(fits the base)."
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
    """Compare checkpoints or adapters, and report the differences.

    verify(MERGED, base=BASE, adapters=[(A, s), …])   MergeCheck   round(base + Σ s·ΔW), within 1 ULP?
    verify(A, B)                                      DeltaCheck   same ΔW, within `tolerance` per layer or vector?
    verify(A, base=BASE)                              FitCheck     does the base have these layers? Headers only.

    Parameters
    ----------
    first, second : merged checkpoint or adapter; second adapter.
    base, adapters : base model (for two adapters: resolves names, provides the weights for DoRA); pairs with strength.
    tolerance, exact : relative Frobenius difference, as above; whether merged weights must be equal bit for bit.
    component, block_weights, allow_missing : as in `merge`.
    progress : called with (done, total).

    Returns
    -------
    MergeCheck, DeltaCheck or FitCheck : with `same`, `exit_code` and measurements; a difference is not an error.

    Raises
    ------
    UsageError : the arguments select none of the three comparisons. Also what reading the files raises.

    Examples
    --------
    >>> from importlib.resources import files
    >>> assets = files("krona_hub.assets")
    >>> verify(assets / "zorbi_lora_kohya.safetensors", assets / "zorbi_lora_diffusers.safetensors").same
    True
    """
    if not (isfinite(tolerance) and tolerance >= 0):
        raise UsageError(f"Invalid tolerance {tolerance}.", fix="Use a number of at least 0, such as 1e-5.")
    if adapters and second is None and base is not None:
        from krona_hub.verification.check_merge import contains

        return contains(
            first, base, adapters, exact=exact, component=component, block_weights=block_weights,
            allow_missing=allow_missing, progress=progress,
        )  # fmt: skip
    if second is not None and not adapters:
        from krona_hub.verification.compare_adapters import same_delta

        return same_delta(first, second, base, tolerance, component, allow_missing, progress)
    if base is not None and not adapters:
        from krona_hub.verification.check_fit import fits

        return fits(first, base, component)
    raise UsageError("The arguments do not select a comparison.", fix=_USAGE)
