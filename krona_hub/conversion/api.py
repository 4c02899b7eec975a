"""`convert`: checks the options before reading any file. Torch-free until then."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from krona_hub.aliases import Progress
from krona_hub.checkpoints.atomic import check_output
from krona_hub.conversion.methods import Budget, MaxError, Method, Rank, choose_method
from krona_hub.conversion.output_options import format_named, optional_dtype
from krona_hub.conversion.report import ConversionReport
from krona_hub.conversion.request import ConvertRequest
from krona_hub.errors import UsageError
from krona_hub.formats.compatibility.applications import application_named, is_lora_format
from krona_hub.formats.known.registry import storage_of
from krona_hub.sources import resolve

if TYPE_CHECKING:
    import torch

    from krona_hub.adapters.moments import Moments
    from krona_hub.conversion.effect_report import EffectReport
    from krona_hub.conversion.prepared import PreparedConversion


def convert(
    source: str | Path,
    out: str | Path | None = None,
    *,
    to: str | None = None,
    tool: str | None = None,
    shape: str | tuple[int, int] | None = None,
    terms: int = 1,
    shape_fallback: str | None = None,
    max_error: float | None = None,
    budget: str | int | None = None,
    exact: bool = False,
    rank: int | None = None,
    base: str | Path | None = None,
    from_format: str | None = None,
    component: str | None = None,
    allow_loss: bool = False,
    allow_missing: bool = False,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    split_qkv: bool = False,
    dry_run: bool = False,
    moments: Moments | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert an adapter to another format or factorization, and measure the error of every layer.

    Choose at most one method: `shape`, `max_error`, `budget`, `exact` or `rank`. By default, layers of the target's
    kind keep their factors and others become the smallest factorization within 5 % relative error. A total error above
    0.5 is refused, except with `budget`, which may leave layers out, and `rank`: they state the size.

    Parameters
    ----------
    source, out : adapter file, PEFT folder or Hub id; output path (default: named after the format, beside the source).
    to, tool : target format (a name of FORMATS, `lora` or `lokr`); target application, for which `to` may be the kind.
    shape, terms, shape_fallback : size `a1xa2` of A; Kronecker terms; "nearest" for layers that a1xa2 does not divide.
    max_error, budget : relative Frobenius error per layer, 0 to 1; parameters in total, or a share, "50%" or "1/2".
    exact, rank : equal up to rounding; best LoRA of that rank.
    base, from_format, component : base model (DoRA needs its weights), source format, component; default: detected.
    allow_loss, allow_missing, overwrite : accept a total error above 0.5, unmatched modules, an existing output.
    moments : with them (`calibrate`), budget, rank and max_error, then √(1 − effect), act on the predicted effect.
    dtype, split_qkv, dry_run, progress : stored dtype; split fused projections; do not write; called (done, total).

    Returns
    -------
    ConversionReport : sizes and errors, measured on the numbers that are written.

    Raises
    ------
    LossyError, InexpressibleError : error above 0.5; the target cannot hold a delta. Also what `read`, `write` raise.
    UsageError : contradictory options; a budget below the smallest factorization of any layer.

    Examples
    --------
    >>> from importlib.resources import files
    >>> lora = files("krona_hub.assets") / "zorbi_lora_kohya.safetensors"
    >>> convert(lora, to="krona", exact=True, dry_run=True).verdict
    'Exact: the delta is the same up to rounding. Same number of parameters.'
    """
    request = conversion_request(
        source, out, to=to, tool=tool, shape=shape, terms=terms, shape_fallback=shape_fallback, max_error=max_error,
        budget=budget, exact=exact, rank=rank, base=base, from_format=from_format, component=component,
        allow_loss=allow_loss, allow_missing=allow_missing, dtype=dtype, overwrite=overwrite, split_qkv=split_qkv,
        dry_run=dry_run, moments=moments,
    )  # fmt: skip
    from krona_hub.conversion.execute import execute

    return execute(request, progress)


def conversion_request(
    source: str | Path,
    out: str | Path | None = None,
    *,
    to: str | None = None,
    tool: str | None = None,
    shape: str | tuple[int, int] | None = None,
    terms: int = 1,
    shape_fallback: str | None = None,
    max_error: float | None = None,
    budget: str | int | None = None,
    exact: bool = False,
    rank: int | None = None,
    base: str | Path | None = None,
    from_format: str | None = None,
    component: str | None = None,
    allow_loss: bool = False,
    allow_missing: bool = False,
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    split_qkv: bool = False,
    dry_run: bool = False,
    moments: Moments | None = None,
) -> ConvertRequest:
    """Check the arguments of `convert` as far as possible without reading a file. Raises UsageError."""
    _check_consistent(to, tool, exact, allow_missing)
    method = choose_method(
        shape=shape, terms=terms, shape_fallback=shape_fallback,
        max_error=max_error, budget=budget, exact=exact, rank=rank,
    )  # fmt: skip
    if moments is not None:
        check_weighted(method)
    request = ConvertRequest(
        source=str(source), path=resolve(source), out=None if out is None else Path(out), method=method,
        to=_format(to, tool), tool=None if tool is None else application_named(tool).name,
        base=base, from_format=from_format, component=component, dtype=optional_dtype(dtype),
        allow_loss=allow_loss, allow_missing=allow_missing, overwrite=overwrite, split_qkv=split_qkv, dry_run=dry_run,
        moments=moments,
    )  # fmt: skip
    _check_output(request)
    return request


def check_weighted(method: Method | None) -> None:
    """Raise UsageError unless a method uses moments."""
    if not isinstance(method, Budget | Rank | MaxError):
        raise UsageError(
            "--calibrate and --moments apply to --budget, --rank and --max-error.",
            fix="Choose one of them, such as --budget 1/8.",
        )


def prepared_conversion(request: ConvertRequest, progress: Progress | None = None) -> PreparedConversion:
    """Compute and measure the result of a request without writing it."""
    from krona_hub.conversion.execute import prepare

    return prepare(request, progress)


def finished_conversion(prepared: PreparedConversion, effect: EffectReport | None = None) -> ConversionReport:
    """Write a prepared result. Raises LossyError if it keeps too little."""
    from krona_hub.conversion.execute import finish

    return finish(prepared, effect)


def _format(to: str | None, tool: str | None) -> str | None:
    """The target format; for an application, `to` is resolved by what it loads."""
    return to if to is None or tool is not None else format_named(to)


def _check_consistent(to: str | None, tool: str | None, exact: bool, allow_missing: bool) -> None:
    if exact and allow_missing:
        raise UsageError("--exact and --allow-missing exclude each other.", fix="--exact never leaves anything out.")
    if to is not None and tool is not None:
        is_lora_format(application_named(tool), to)


def _check_output(request: ConvertRequest) -> None:
    """Raise before any work what writing would raise, if the output is known to be a file."""
    if (
        request.out is not None
        and request.tool is None
        and (request.to is None or not storage_of(request.to).folder)
        and not request.dry_run
    ):
        check_output(request.out, overwrite=request.overwrite)
