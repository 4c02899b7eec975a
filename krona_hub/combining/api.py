"""`combine`: what is asked for, checked before any file is read. Torch-free until then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from krona_hub.aliases import Progress
from krona_hub.checkpoints.atomic import check_output
from krona_hub.combining.report import CombineReport
from krona_hub.combining.request import CombineInput, CombineRequest
from krona_hub.conversion.methods import choose_method
from krona_hub.conversion.output_options import dtype_named, format_named
from krona_hub.errors import UsageError
from krona_hub.formats.known.registry import storage_of
from krona_hub.sources import resolve

if TYPE_CHECKING:
    import torch

    from krona_hub.adapters.adapter import Adapter


def combine(
    adapters: Sequence[tuple[Adapter | str | Path, float]],
    out: str | Path | None = None,
    *,
    terms: int | None = None,
    max_error: float | None = None,
    base: str | Path | None = None,
    to: str = "krona",
    component: str | None = None,
    dtype: str | torch.dtype | None = None,
    allow_loss: bool = False,
    allow_missing: bool = False,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> CombineReport:
    """One adapter that is the weighted sum of several: Σ weight · ΔW, exactly, with the union of their layers.

    Adapters may have any formats and shapes. `terms` or `max_error` makes the result smaller: the nearest sum of that
    many terms per layer, or the smallest form within that relative error; the error is measured on what is written.
    Without `out` nothing is written. Raises BaseMismatchError for adapters of different bases, UnsupportedError for
    DoRA layers that would have to be added, InexpressibleError where the format `to` cannot hold the sum, LossyError
    where the total error exceeds 0.5 (unless `allow_loss`), and what `read` and `write` raise.
    """
    _check_wish(terms, max_error)
    request = CombineRequest(
        ingredients=tuple(_ingredient(i, source, weight) for i, (source, weight) in enumerate(adapters, 1)),
        out=None if out is None else Path(out),
        terms=terms,
        max_error=max_error,
        base=base,
        format=format_named(to),
        component=component,
        dtype=None if dtype is None else dtype_named(str(dtype).removeprefix("torch.")),
        allow_loss=allow_loss,
        allow_missing=allow_missing,
        allow_base_mismatch=allow_base_mismatch,
        overwrite=overwrite,
        dry_run=dry_run or out is None,
    )
    _check_place(request)
    from krona_hub.combining.execute import execute

    return execute(request, progress)


def _check_wish(terms: int | None, max_error: float | None) -> None:
    if terms is not None and max_error is not None:
        raise UsageError("--terms and --max-error exclude each other.", fix="Give one of them.")
    if terms is not None and terms < 1:
        raise UsageError(f"--terms is {terms}.", fix="Give --terms a whole number from 1 up.")
    choose_method(max_error=max_error)


def _ingredient(place: int, source: Adapter | str | Path, weight: float) -> CombineInput:
    if isinstance(source, str | Path):
        return CombineInput(str(source), resolve(source), float(weight))
    return CombineInput(f"adapter {place}", source, float(weight))


def _check_place(request: CombineRequest) -> None:
    """Raise now what writing would raise in the end, where the output is a file."""
    if request.out is not None and not storage_of(request.format).folder and not request.dry_run:
        check_output(request.out, overwrite=request.overwrite)
