"""A new file of known size, filled at known places by several threads. Torch-free."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from krona_hub.checkpoints.byte_ranges import Copier, Range, chunks, joined, write_at
from krona_hub.checkpoints.os_errors import fault
from krona_hub.checkpoints.workers import ByteCounter, Task, run_tasks
from krona_hub.errors import IntegrityError

STEP = 1 << 26  # bytes that are worth a sync


class FilePart(NamedTuple):
    """Bytes of the new file, and the work that puts them there."""

    offset: int  # of the first one
    write: Task


def fill(
    file: BinaryIO,
    opening: bytes,
    size: int,
    parts: Iterable[FilePart],
    *,
    threads: int = 2,
    progress: ByteCounter | None = None,
) -> None:
    """Make `file` `size` bytes long: `opening`, then the parts, begun in the order of their places.

    The bytes are on their way to the disk when it ends, not surely there: an fsync must follow.
    """
    file.truncate(size)
    ordered = [FilePart(0, partial(_put, file, opening)), *sorted(parts, key=lambda part: part.offset)]
    with syncing_behind(file) as wrote:

        def told(count: int) -> None:
            wrote(count)
            if progress is not None:
                progress(count)

        run_tasks((part.write for part in ordered), threads=threads, progress=told)


def copied(source: BinaryIO, target: BinaryIO, ranges: Iterable[Range]) -> list[FilePart]:
    """The work of copying ranges, in parts that are small enough to share out."""
    copier = Copier(source, target)
    return [FilePart(c.target, partial(_copy, copier, c)) for run in joined(ranges) for c in chunks(run)]


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


def _put(file: BinaryIO, data: bytes, report: ByteCounter) -> None:
    write_at(file.fileno(), data, 0)
    report(len(data))


def _copy(copier: Copier, piece: Range, report: ByteCounter) -> None:
    copier.copy(piece)
    report(piece.length)


@contextmanager
def syncing_behind(file: BinaryIO) -> Iterator[ByteCounter]:
    """Gives a function to be told the bytes written to `file`; a thread syncs them. Ends when no sync is under way.

    Nothing is promised about what is on the disk: an fsync must follow, and tells whether all went well.
    """
    behind = _Behind(file.fileno())
    thread = threading.Thread(target=behind.follow, name="krona-sync", daemon=True)
    thread.start()
    try:
        yield behind.wrote
    finally:
        behind.end()
        thread.join()


class _Behind:
    """A count of bytes that are not yet on their way, between the writers and the thread that syncs."""

    def __init__(self, file: int) -> None:
        self.file, self.waiting, self.ended = file, 0, False
        self.changed = threading.Condition()

    def wrote(self, count: int) -> None:
        with self.changed:
            self.waiting += count
            if self.waiting >= STEP:
                self.changed.notify()

    def end(self) -> None:
        with self.changed:
            self.ended = True
            self.changed.notify()

    def follow(self) -> None:
        while self._due():
            with suppress(OSError):  # the fsync at the end tells
                getattr(os, "fdatasync", os.fsync)(self.file)

    def _due(self) -> bool:
        """Wait for enough bytes; False at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.ended or self.waiting >= STEP)
            self.waiting = 0
            return not self.ended
