"""`merge`: what is asked for, checked and planned before torch is imported or a number read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from krona_hub.aliases import Progress
from krona_hub.errors import UsageError
from krona_hub.merging.output.write_model import MergeDestination, check_place
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
    """Write `base` with Σ weight · ΔW of the adapters added, in the layout of the base; say what rounding took.

    Every changed number is W + Σ w·ΔW in float32 (float64 with `exact_rounding`), rounded once to the stored type or to
    `out_dtype`; everything else is copied byte for byte. The output appears whole, by rename, when all is done.
    `in_place` changes the base itself and needs `undo`, the file that `unmerge` restores it from. `hash` records the
    sha256 of the base and of the output's data; by default where that costs little. What can be merged, and the other
    options, is said by `plan_merge`, which raises the same errors. Besides: NonFiniteError for a sum that overflows the
    stored type, ConflictError for an output in the way, ResourceError for a full disk; then nothing was written.
    """
    if (out is None) != in_place:
        raise UsageError("say where to write: to a new place or in place.", fix="Give -o OUT, or --in-place --undo F.")
    _check_options(rounding, threads)
    plan = plan_merge(
        base,
        adapters,
        component=component,
        block_weights=block_weights,
        out_dtype=out_dtype,
        from_format=from_format,
        allow_missing=allow_missing,
        allow_base_mismatch=allow_base_mismatch,
    )
    place = MergeDestination(plan.tree.root, _path(out), _path(undo), overwrite=overwrite, link=link)
    check_place(place, [file.path for file in plan.files])
    options = _told(out_dtype=out_dtype, block_weights=block_weights, component=component)
    options |= _rounding(rounding, seed, exact_rounding)
    request = MergeRequest(
        plan=plan,
        place=place,
        rounding=rounding,
        seed=seed,
        exact_rounding=exact_rounding,
        options=options,
        hash=hash,
        title=title,
        threads=threads,
    )
    from krona_hub.merging.execute import execute

    return execute(request, progress)


def _check_options(rounding: str, threads: int) -> None:
    if rounding not in get_args(Mode):
        raise UsageError(f"{rounding!r} is no way of rounding.", fix=f"Choose one of {', '.join(get_args(Mode))}.")
    if threads < 1:
        raise UsageError(f"a merge cannot run on {threads} threads.", fix="Give 1 or more.")


def _told(**options: Any) -> dict[str, Any]:
    """The options that differ from their defaults."""
    return {name: value for name, value in options.items() if value and value != "keep"}


def _rounding(mode: str, seed: int, exact: bool) -> dict[str, Any]:
    told = {} if mode == "nearest" else {"rounding": mode, "seed": seed}
    return told | ({"exact_rounding": True} if exact else {})


def _path(said: str | Path | None) -> Path | None:
    return None if said is None else Path(said).expanduser()
