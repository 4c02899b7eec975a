"""Writing a new file of known size by several threads, at known offsets. Torch-free."""

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

STEP = 1 << 26  # bytes written between two syncs


class FilePart(NamedTuple):
    """A part of the new file: its offset, and the task that writes it."""

    offset: int  # of the first byte
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
    """Write a file of `size` bytes: `opening`, then the parts, started in the order of their offsets.

    On return the bytes are not guaranteed to be on the disk: an fsync must follow.
    """
    file.truncate(size)
    ordered = [FilePart(0, partial(_put, file, opening)), *sorted(parts, key=lambda part: part.offset)]
    with background_sync(file) as count_written:

        def report(count: int) -> None:
            count_written(count)
            if progress is not None:
                progress(count)

        run_tasks((part.write for part in ordered), threads=threads, progress=report)


def copied(source: BinaryIO, target: BinaryIO, ranges: Iterable[Range]) -> list[FilePart]:
    """Return the tasks that copy ranges, in parts small enough to distribute over threads."""
    copier = Copier(source, target)
    return [FilePart(c.target, partial(_copy, copier, c)) for run in joined(ranges) for c in chunks(run)]


def open_source(path: Path, size: int) -> BinaryIO:
    """Open a file for sequential reading. Raises IntegrityError if its size is not `size` bytes."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise fault(error, path) from None
    if os.fstat(file.fileno()).st_size != size:
        file.close()
        raise IntegrityError(f"{str(path)!r} changed while it was being read.", fix="Try again.")
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
def background_sync(file: BinaryIO) -> Iterator[ByteCounter]:
    """Sync `file` in a background thread; yields a function that counts the bytes written so far.

    The block ends when no sync is in progress. An fsync must follow: it guarantees that the bytes are on the disk and
    reports errors.
    """
    syncer = _Syncer(file.fileno())
    thread = threading.Thread(target=syncer.run, name="krona-sync", daemon=True)
    thread.start()
    try:
        yield syncer.count_written
    finally:
        syncer.end()
        thread.join()


class _Syncer:
    """The count of bytes that are not synced yet, shared by the writers and the syncing thread."""

    def __init__(self, file: int) -> None:
        self.file, self.waiting, self.ended = file, 0, False
        self.changed = threading.Condition()

    def count_written(self, count: int) -> None:
        with self.changed:
            self.waiting += count
            if self.waiting >= STEP:
                self.changed.notify()

    def end(self) -> None:
        with self.changed:
            self.ended = True
            self.changed.notify()

    def run(self) -> None:
        while self._wait_until_due():
            with suppress(OSError):  # the fsync at the end reports errors
                getattr(os, "fdatasync", os.fsync)(self.file)

    def _wait_until_due(self) -> bool:
        """Wait until enough bytes are written; return False at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.ended or self.waiting >= STEP)
            self.waiting = 0
            return not self.ended
