"""`convert`: what is asked for, checked before any file is read. Torch-free until then."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from krona_hub.aliases import Progress
from krona_hub.checkpoints.atomic import check_output
from krona_hub.conversion.methods import choose_method
from krona_hub.conversion.output_options import dtype_named, format_named
from krona_hub.conversion.report import ConversionReport
from krona_hub.conversion.request import ConvertRequest
from krona_hub.errors import UsageError
from krona_hub.formats.compatibility.tools import tool_named
from krona_hub.formats.known.registry import storage_of
from krona_hub.sources import resolve

if TYPE_CHECKING:
    import torch


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
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert an adapter file or folder to another format, and say what it cost.

    `to` is a format of FORMATS, or `lora` or `lokr`; `tool` picks format, names and shapes for a program and
    keeps the kind. At most one of `shape`, `max_error`, `budget`, `exact` and `rank` says how; without one a
    LoRA becomes the smallest Kronecker form within 5 % per layer, and a Kronecker adapter stays what it is.
    Every error in the report is measured on the numbers that are written.

    Raises LossyError where the total relative error exceeds 0.5 (unless `allow_loss`), InexpressibleError
    where the target cannot hold a delta, and what `read` and `write` raise; then nothing is written.
    """
    method = choose_method(
        shape=shape,
        terms=terms,
        shape_fallback=shape_fallback,
        max_error=max_error,
        budget=budget,
        exact=exact,
        rank=rank,
    )
    if to is not None and tool is not None:
        raise UsageError("--to and --for exclude each other.", fix="--for chooses the format itself.")
    request = ConvertRequest(
        source=str(source),
        path=resolve(source),
        out=None if out is None else Path(out),
        method=method,
        to=None if to is None else format_named(to),
        tool=None if tool is None else tool_named(tool).name,
        base=base,
        from_format=from_format,
        component=component,
        dtype=None if dtype is None else dtype_named(str(dtype).removeprefix("torch.")),
        allow_loss=allow_loss,
        allow_missing=allow_missing,
        overwrite=overwrite,
        split_qkv=split_qkv,
        dry_run=dry_run,
    )
    _check_place(request)
    from krona_hub.conversion.execute import execute

    return execute(request, progress)


def _check_place(request: ConvertRequest) -> None:
    """Raise now what writing would raise in the end, where the output is known to be a file."""
    if (
        request.out is not None
        and request.tool is None
        and (request.to is None or not storage_of(request.to).folder)
        and not request.dry_run
    ):
        check_output(request.out, overwrite=request.overwrite)
