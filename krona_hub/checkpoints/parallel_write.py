"""A new file of known size, filled at known places by several threads. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from krona_hub.checkpoints.byte_ranges import Copier, Range, chunks, joined, write_at
from krona_hub.checkpoints.os_errors import fault
from krona_hub.checkpoints.syncing import syncing_behind
from krona_hub.checkpoints.workers import Progress, Task, run_tasks
from krona_hub.errors import IntegrityError


class Part(NamedTuple):
    """Bytes of the new file, and the work that puts them there."""

    offset: int  # of the first one
    write: Task


def fill(
    file: BinaryIO,
    opening: bytes,
    size: int,
    parts: Iterable[Part],
    *,
    threads: int = 2,
    progress: Progress | None = None,
) -> None:
    """Make `file` `size` bytes long: `opening`, then the parts, begun in the order of their places.

    The bytes are on their way to the disk when it ends, not surely there: an fsync must follow.
    """
    file.truncate(size)
    ordered = [Part(0, partial(_put, file, opening)), *sorted(parts, key=lambda part: part.offset)]
    with syncing_behind(file) as wrote:

        def told(count: int) -> None:
            wrote(count)
            if progress is not None:
                progress(count)

        run_tasks((part.write for part in ordered), threads=threads, progress=told)


def copied(source: BinaryIO, target: BinaryIO, ranges: Iterable[Range]) -> list[Part]:
    """The work of copying ranges, in parts that are small enough to share out."""
    copier = Copier(source, target)
    return [Part(c.target, partial(_copy, copier, c)) for run in joined(ranges) for c in chunks(run)]


def open_source(path: Path, size: int) -> BinaryIO:
    """The file, to be read from start to end. Raises IntegrityError where it has not `size` bytes."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise fault(error, path) from None
    if os.fstat(file.fileno()).st_size != size:
        file.close()
        raise IntegrityError(f"{str(path)!r} changed while it was read.", fix="Try again.")
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return file


def _put(file: BinaryIO, data: bytes, report: Progress) -> None:
    write_at(file.fileno(), data, 0)
    report(len(data))


def _copy(copier: Copier, piece: Range, report: Progress) -> None:
    copier.copy(piece)
    report(piece.length)
