"""`combine`: checks the options before reading any file. Torch-free until then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from krona_hub.aliases import Progress
from krona_hub.checkpoints.atomic import check_output
from krona_hub.combining.report import CombineReport
from krona_hub.combining.request import CombineInput, CombineRequest
from krona_hub.conversion.methods import choose_method
from krona_hub.conversion.output_options import format_named, optional_dtype
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
    """Combine adapters into one, their weighted sum Σ weight · ΔW: exact, over the union of layers and vectors.

    Adapters may have different formats and shapes. `terms` or `max_error` makes the result smaller.

    Parameters
    ----------
    adapters : pairs (adapter, file or Hub id; weight of any sign).
    out, to, dtype : output path (None: measure only), format (a name of FORMATS, `lora` or `lokr`), stored dtype.
    terms, max_error : nearest sum of that many terms per layer; smallest factorization within that relative error.
    base, component : base model and component, if the files do not identify them.
    allow_loss, allow_missing, allow_base_mismatch, overwrite : accept a total error above 0.5, unmatched modules,
        adapters of different base models, an existing output.
    dry_run, progress : do not write; called with (done, total).

    Returns
    -------
    CombineReport : sizes and errors against the exact sum, measured on the numbers that are written.

    Raises
    ------
    BaseMismatchError, LossyError : different base models; total error above 0.5.
    UnsupportedError, InexpressibleError : DoRA layers to be added; the format cannot hold the sum.

    Examples
    --------
    >>> import torch
    >>> from krona_hub import Adapter, KronTerms, LayerDelta
    >>> layer = LayerDelta((KronTerms(torch.ones(1, 2, 2), torch.ones(1, 4, 3)),), (8, 6))
    >>> report = combine([(Adapter({"unet.x": layer}), 0.5), (Adapter({"unet.y": layer}), 0.8)])
    >>> len(report.layers), report.parameters_after, report.relative_error
    (2, 32, 0.0)
    """
    _check_options(terms, max_error)
    request = CombineRequest(
        inputs=tuple(_input(i, source, weight) for i, (source, weight) in enumerate(adapters, 1)),
        out=None if out is None else Path(out), terms=terms, max_error=max_error, base=base, format=format_named(to),
        component=component, dtype=optional_dtype(dtype), allow_loss=allow_loss, allow_missing=allow_missing,
        allow_base_mismatch=allow_base_mismatch, overwrite=overwrite, dry_run=dry_run or out is None,
    )  # fmt: skip
    _check_output(request)
    from krona_hub.combining.execute import execute

    return execute(request, progress)


def _check_options(terms: int | None, max_error: float | None) -> None:
    if terms is not None and max_error is not None:
        raise UsageError("--terms and --max-error exclude each other.", fix="Choose at most one method.")
    if terms is not None and terms < 1:
        raise UsageError(f"Invalid value {terms} for --terms.", fix="Use an integer of at least 1.")
    choose_method(max_error=max_error)


def _input(number: int, source: Adapter | str | Path, weight: float) -> CombineInput:
    if isinstance(source, str | Path):
        return CombineInput(str(source), resolve(source), float(weight))
    return CombineInput(f"adapter {number}", source, float(weight))


def _check_output(request: CombineRequest) -> None:
    """Raise before any work what writing would raise, if the output is a file."""
    if request.out is not None and not storage_of(request.format).folder and not request.dry_run:
        check_output(request.out, overwrite=request.overwrite)
