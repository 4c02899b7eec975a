"""The way back from a merge: the base's files, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from krona_hub.checkpoints.workers import Progress


class UnmergeReport(NamedTuple):
    """What was restored, every file checked by its sha256."""

    out: Path
    restored: tuple[Path, ...]  # files that were merged and are now the base's again
    unchanged: tuple[Path, ...]  # files of the undo that were the base's already (an interrupted merge in place)
    copied: tuple[Path, ...]  # other files of the folder
    nbytes: int  # written
    seconds: float


def unmerge(
    merged: str | Path,
    undo: str | Path,
    out: str | Path | None = None,
    *,
    in_place: bool = False,
    overwrite: bool = False,
    threads: int = 2,
    progress: Progress | None = None,
) -> UnmergeReport:
    """Restore the base from a merged file or folder and the undo file of that merge, at `out` or in place.

    Raises IntegrityError where `merged` is not what that merge wrote or where the result is not the base,
    FormatError for a file that is no undo file; UsageError without `out` and `in_place`.
    """
    raise NotImplementedError
