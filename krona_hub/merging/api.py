"""`merge`: checks and plans the request before importing torch or reading any weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from krona_hub.aliases import Progress
from krona_hub.errors import UsageError
from krona_hub.merging.output.write_model import MergeDestination, check_destination
from krona_hub.merging.plan import OutDtype, plan_merge
from krona_hub.merging.report import MergeReport
from krona_hub.merging.request import MergeRequest, Mode

if TYPE_CHECKING:
    from krona_hub.adapters.adapter import Adapter


def merge(
    base: str | Path,
    adapters: Sequence[tuple[Adapter | str | Path, float]],
    out: str | Path | None = None,
    *,
    component: str | None = None,
    block_weights: Mapping[str, float] | None = None,
    out_dtype: OutDtype = "keep",
    rounding: Mode = "nearest",
    seed: int = 0,
    exact_rounding: bool = False,
    from_format: str | None = None,
    allow_missing: bool = False,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
    link: bool = False,
    in_place: bool = False,
    undo: str | Path | None = None,
    hash: bool | None = None,
    title: str | None = None,
    threads: int = 2,
    progress: Progress | None = None,
) -> MergeReport:
    """Write `base` with Σ strength · ΔW of the adapters added, in the layout of the base, and measure the rounding.

    Each changed weight is W + Σ s·ΔW, rounded once; all other bytes are copied. The output appears atomically.

    Parameters
    ----------
    base, adapters, component, block_weights, from_format, allow_missing, allow_base_mismatch : see `plan_merge`.
    out, in_place, undo, overwrite, link : output path; or change the base itself, which requires `undo`, the file for
        `unmerge`; replace existing files; hard-link untouched files.
    out_dtype, rounding, seed : see `plan_merge`; "nearest" or "stochastic", and its seed.
    exact_rounding, hash, title : sum in float64; record sha256 (None: if cheap); title in the metadata.
    threads, progress : writer threads; called with (done, total) in bytes.

    Returns
    -------
    MergeReport : changed tensors and files, with the share of the change lost in rounding.

    Raises
    ------
    NonFiniteError, ConflictError, ResourceError : overflow of the stored dtype; existing output; full disk. Also what
        `plan_merge` raises. Nothing is written then.

    Examples
    --------
    >>> import tempfile
    >>> from importlib.resources import files
    >>> lora = files("krona_hub.assets") / "zorbi_lora_kohya.safetensors"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     len(merge("tiny-scenes", [(lora, 0.8)], f"{folder}/merged").tensors)
    56
    """
    _check_options(out, in_place, rounding, threads)
    plan = plan_merge(
        base, adapters, component=component, block_weights=block_weights, out_dtype=out_dtype, from_format=from_format,
        allow_missing=allow_missing, allow_base_mismatch=allow_base_mismatch,
    )  # fmt: skip
    destination = MergeDestination(plan.tree.root, _path(out), _path(undo), overwrite=overwrite, link=link)
    check_destination(destination, [file.path for file in plan.files])
    options = _non_defaults(out_dtype=out_dtype, block_weights=block_weights, component=component)
    options |= _rounding(rounding, seed, exact_rounding)
    request = MergeRequest(
        plan=plan, destination=destination, rounding=rounding, seed=seed, exact_rounding=exact_rounding,
        options=options, hash=hash, title=title, threads=threads,
    )  # fmt: skip
    from krona_hub.merging.execute import execute

    return execute(request, progress)


def _check_options(out: str | Path | None, in_place: bool, rounding: str, threads: int) -> None:
    if (out is None) != in_place:
        cause = "Missing option --output." if out is None else "--output and --in-place exclude each other."
        raise UsageError(cause, fix="Specify -o OUT, or --in-place --undo FILE.")
    if rounding not in get_args(Mode):
        raise UsageError(f"Unknown rounding mode {rounding!r}.", fix=f"Choose one of {', '.join(get_args(Mode))}.")
    if threads < 1:
        raise UsageError(f"Invalid number of threads {threads}.", fix="Use at least 1 thread.")


def _non_defaults(**options: Any) -> dict[str, Any]:
    """Return the options that differ from their defaults."""
    return {name: value for name, value in options.items() if value and value != "keep"}


def _rounding(mode: str, seed: int, exact: bool) -> dict[str, Any]:
    options = {} if mode == "nearest" else {"rounding": mode, "seed": seed}
    return options | ({"exact_rounding": True} if exact else {})


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path).expanduser()
