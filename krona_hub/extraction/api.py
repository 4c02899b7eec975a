"""`extract`: checks the options before reading any tensor. Torch-free until then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from krona_hub.aliases import Progress
from krona_hub.bases import catalog
from krona_hub.checkpoints.atomic import check_output
from krona_hub.conversion.output_options import default_out, format_named, optional_dtype
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
    """Extract the adapter that turns `base` into `tuned`: per layer the nearest Kronecker sum of tuned − base.

    A sum ends where the rounding noise of the stored numbers begins, unless `terms`, `max_error` or `budget` is given
    (at most one). Only a few layers are in memory at a time.

    Parameters
    ----------
    base, tuned : diffusers folders, component folders, checkpoint files or Hub ids, in any layout and dtype.
    out, to, dtype : output path, format (a name of FORMATS, `lora` or `lokr`) and dtype (default: float32).
    shape, shape_fallback : size `a1xa2` of A, or "auto" (best shape, or LoRA, per layer); "nearest" if indivisible.
    terms, max_error, budget : terms (with "auto": maximum); relative error per layer; parameters, or a share ("1%").
    component, targets : component to compare; named sets of layers, or regular expressions of layer names.
    also_vectors, base_name : also store changed norms and biases, as vectors; base model, if not identifiable.
    allow_loss, overwrite, dry_run : accept a total error above 0.5; replace `out`; measure without writing.
    threads, progress : number of threads (default: at most 4); called with (done, total).

    Returns
    -------
    ExtractionReport : per layer and in total, measured on the numbers that are written.

    Raises
    ------
    NoDifferenceError, BaseMismatchError : no difference beyond rounding; different layers or shapes.
    LossyError, InexpressibleError : error above 0.5; the format cannot store the result. Also what `write` raises.

    Examples
    --------
    >>> import tempfile
    >>> from importlib.resources import files
    >>> from krona_hub import merge
    >>> base, lora = (files("krona_hub.assets") / name for name in ("tiny-scenes", "zorbi_lora_kohya.safetensors"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = merge(base, [(lora, 1.0)], f"{folder}/tuned")
    ...     extract(base, f"{folder}/tuned", component="text_encoder", to="lora", dry_run=True).verdict
    'Nearly identical: the delta differs by at most 1 %. 16,384 parameters (12.50 % of the dense difference).'
    """
    fit = fit_request(shape, terms, max_error, budget, shape_fallback)
    format = _format(to, with_shape=fit.shape is not None)
    request = ExtractRequest(
        base=str(base), tuned=str(tuned), base_path=_checkpoint(base), tuned_path=_checkpoint(tuned),
        out=Path(out) if out is not None else default_out(tuned, format), fit=fit, format=format,
        component=component, targets=targets, also_vectors=also_vectors, base_name=base_name,
        dtype=optional_dtype(dtype), allow_loss=allow_loss, overwrite=overwrite, threads=threads, dry_run=dry_run,
    )  # fmt: skip
    _check_output(request)
    from krona_hub.extraction.execute import execute

    return execute(request, progress)


def _check_output(request: ExtractRequest) -> None:
    """Raise before any work what writing would raise, if the output is a file."""
    if not storage_of(request.format).folder and not request.dry_run:
        check_output(request.out, overwrite=request.overwrite)


def _format(to: str, *, with_shape: bool) -> str:
    format = format_named(to)
    if storage_of(format).kind == "low-rank" and with_shape:
        raise UsageError("--shape does not apply to a LoRA target.", fix="Use --terms for the rank, or --max-error.")
    if format == DIFFUSEKRONA.name:
        raise InexpressibleError(
            "DiffuseKronA stores interleaved rows, which a nearest Kronecker product A ⊗ B cannot represent.",
            fix="Choose --to krona, lokr or lora.",
        )
    return format


def _checkpoint(source: str | Path) -> Path:
    """Return the local path of a checkpoint, downloading it from the Hub if necessary."""
    if not Path(source).exists() and catalog.find(str(source)) is not None:
        raise UnknownBaseError(
            f"{source} is a catalog name; extraction requires the weights.",
            fix="Specify the folder or file of the checkpoint.",
        )
    return resolve_base(source) if is_remote(source) else resolve(source)
