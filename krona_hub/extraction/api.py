"""`extract`: what is asked for, checked before any tensor is read. Torch-free until then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from krona_hub.aliases import Progress
from krona_hub.bases import catalogue
from krona_hub.checkpoints.atomic import check_output
from krona_hub.conversion.output_options import default_out, dtype_named, format_named
from krona_hub.errors import InexpressibleError, UnknownBaseError, UsageError
from krona_hub.extraction.report import ExtractionReport
from krona_hub.extraction.request import ExtractRequest, fit_request
from krona_hub.formats.known.diffusekrona import DIFFUSEKRONA
from krona_hub.formats.known.registry import storage_of
from krona_hub.sources import is_remote, resolve, resolve_base

if TYPE_CHECKING:
    import torch


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path | None = None,
    *,
    shape: str | tuple[int, int] = "auto",
    terms: int | None = None,
    max_error: float | None = None,
    budget: str | int | None = None,
    shape_fallback: str | None = None,
    to: str = "krona",
    component: str | None = None,
    targets: str | Sequence[str] | None = None,
    also_vectors: bool = False,
    base_name: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    allow_loss: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> ExtractionReport:
    """The adapter that turns `base` into `tuned`: per layer the nearest Kronecker sum of the float32 difference.

    Both are diffusers folders, component folders or checkpoint files, in any layout and dtype. `shape` is the size
    `a1xa2` of A in every layer, or `auto`: the shape, or the LoRA form, that suits each layer best. At most one of
    `terms` (with `auto`: the most), `max_error` (per layer) and `budget` (parameters, or a share of the whole
    difference) says where a sum ends; without them it ends where the rounding of the stored numbers begins. `to` is a
    format of FORMATS, or `lora` or `lokr`. `targets` are named sets of layers or regular expressions. `also_vectors`
    keeps the differences of norms, biases and embeddings in extras; without it they are listed only.
    `base_name` names the base where the checkpoints do not tell. A few layers are in memory at a time.

    Raises NoDifferenceError where nothing differs, or nothing by more than rounding; BaseMismatchError where the
    checkpoints do not fit each other; LossyError where the total error that rounding does not explain exceeds 0.5
    (unless `allow_loss`); InexpressibleError where the target cannot hold what was asked for, and what `write`
    raises. Then nothing is written.
    """
    fit = fit_request(shape, terms, max_error, budget, shape_fallback)
    format = _format(to, with_shape=fit.shape is not None)
    request = ExtractRequest(
        base=str(base),
        tuned=str(tuned),
        base_path=_checkpoint(base),
        tuned_path=_checkpoint(tuned),
        out=Path(out) if out is not None else default_out(tuned, format),
        fit=fit,
        format=format,
        component=component,
        targets=targets,
        also_vectors=also_vectors,
        base_name=base_name,
        dtype=None if dtype is None else dtype_named(str(dtype).removeprefix("torch.")),
        allow_loss=allow_loss,
        overwrite=overwrite,
        threads=threads,
        dry_run=dry_run,
    )
    if not storage_of(format).folder and not dry_run:
        check_output(request.out, overwrite=overwrite)
    from krona_hub.extraction.execute import execute

    return execute(request, progress)


def _format(to: str, *, with_shape: bool) -> str:
    format = format_named(to)
    if storage_of(format).kind == "low-rank" and with_shape:
        raise UsageError("a LoRA has no Kronecker shape.", fix="Use --terms for its rank, or --max-error.")
    if format == DIFFUSEKRONA.name:
        raise InexpressibleError(
            "DiffuseKronA interleaves rows, which no nearest A ⊗ B does.", fix="Choose --to krona, lokr or lora."
        )
    return format


def _checkpoint(source: str | Path) -> Path:
    """The path of a checkpoint, from the Hub where it is no local one."""
    if not Path(source).exists() and catalogue.find(str(source)) is not None:
        raise UnknownBaseError(
            f"{source} is a name, and a difference needs the weights.", fix="Give the folder or file of the checkpoint."
        )
    return resolve_base(source) if is_remote(source) else resolve(source)
