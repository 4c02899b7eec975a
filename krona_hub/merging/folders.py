"""The output of a merge has the layout of its input: a file, a folder of files, or the base itself in place.

Files that no adapter touches are copied or linked; everything appears at once, by rename, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from krona_hub.checkpoints.header import Header
from krona_hub.checkpoints.rewrite import Change
from krona_hub.checkpoints.workers import Progress


@dataclass(frozen=True)
class Place:
    """Where a merge reads and writes. `check_place` says whether that can be."""

    base: Path  # a file or a folder
    out: Path | None  # of the same kind; None: the base itself is changed, which needs `undo`
    undo: Path | None = None  # file that will hold what `unmerge` needs
    overwrite: bool = False  # replace what is at `out` and `undo`
    link: bool = False  # hard-link untouched files of a folder instead of copying them


@dataclass(frozen=True)
class MergedFile:
    """A file of the base and what becomes of it."""

    header: Header  # its path is the base itself, or below it
    changes: Mapping[str, Change]
    metadata: Mapping[str, str]  # of the output
    data_hash: str | None = None  # as in `rewrite`
    sha256: str | None = None  # of the file as it is, where that is known; an undo file needs it


class Written(NamedTuple):
    """What was written."""

    files: tuple[Path, ...]  # with merged tensors
    copied: tuple[Path, ...]  # as they were, or linked
    left_out: tuple[Path, ...]  # relative to the base: pickles and other weights that the merge would leave stale
    nbytes: int  # written


def check_place(place: Place, touched: Sequence[Path] = ()) -> None:
    """Raise what writing there would raise, before any work. `touched`: paths of the files that will change.

    UsageError (in place without undo), ConflictError (output exists, equals the base or lies in it, is of the other
    kind, an undo file in the way), NotFoundError (no parent folder), ResourceError (not writable).
    """


def bytes_to_write(place: Place, files: Sequence[MergedFile]) -> int:
    """All bytes that `write_merged` will write, undo file included: what `progress` gets in sum.

    Where an output is overwritten, old and new lie side by side for a while: this much must be free.
    """
    raise NotImplementedError


def write_merged(
    place: Place, files: Sequence[MergedFile], *, threads: int = 2, progress: Progress | None = None
) -> Written:
    """Write the merged files, the untouched ones beside them, and before they appear the undo file.

    Calls `check_place` and checks the free space first. `*.index.json` files of changed shards keep a right
    `total_size`. Links in the base are followed: the output holds files. Pickles and other twins beside changed
    weights are left out (in place: stay), `.git` and download caches too.
    """
    raise NotImplementedError
