"""Copying byte ranges between open files by the fastest method that both file systems support. Torch-free."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from krona_hub.errors import ResourceError

CHUNK = 1 << 24  # bytes per copy: large enough to be fast, small enough to interrupt and to distribute
_BUFFER = 1 << 18  # bytes held in memory when copying through memory
_WRITE = 1 << 16  # bytes per call. Larger writes make the kernel allocate large pages, which takes up to four times as
# long on virtual machines that return free memory to their host, and gains nothing elsewhere (measured on ext4)
_seeking = threading.Lock()  # threads share the one position of a file


class Range(NamedTuple):
    """A byte range to copy: `length` bytes from offset `source` to offset `target`."""

    source: int  # offset in the source file
    target: int  # offset in the target file
    length: int


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Merge ranges that are adjacent in both files, and drop empty ones.

    >>> joined([Range(0, 8, 4), Range(4, 12, 6), Range(20, 18, 1), Range(21, 19, 0)])
    [Range(source=0, target=8, length=10), Range(source=20, target=18, length=1)]
    """
    runs: list[Range] = []
    for piece in ranges:
        last = runs[-1] if runs else None
        if last and (last.source + last.length, last.target + last.length) == piece[:2]:
            runs[-1] = last._replace(length=last.length + piece.length)
        elif piece.length:
            runs.append(piece)
    return runs


def chunks(piece: Range, size: int = CHUNK) -> Iterator[Range]:
    """Split a range into parts of at most `size` bytes, at target offsets that are multiples of `size`.

    Aligned writes fill whole pages: on ext4 this halves the time of a copy.

    >>> [(c.target, c.length) for c in chunks(Range(0, 3, 8), 4)]
    [(3, 1), (4, 4), (8, 3)]
    """
    source, target, end = piece.source, piece.target, piece.target + piece.length
    while target < end:
        length = min(size - target % size, end - target)
        yield Range(source, target, length)
        source, target = source + length, target + length


class Copier:
    """Copy ranges from one open file to another; one instance can be shared by several threads.

    Copies in the kernel if possible (`copy_file_range`, which may share blocks instead of copying; `sendfile` if that
    is refused, for example between two file systems), otherwise through memory. A method that failed once for this
    pair of files is not tried again.
    """

    def __init__(self, source: BinaryIO, target: BinaryIO) -> None:
        self.source, self.target = source, target
        self._methods = [_in_kernel, _by_sendfile, _through_memory]

    def copy(self, piece: Range) -> None:
        """Copy one range. Raises OSError if the disk is full or broken, ResourceError if the source ends too early."""
        while piece.length:
            done = self._copy_some(piece)
            piece = Range(piece.source + done, piece.target + done, piece.length - done)

    def _copy_some(self, piece: Range) -> int:
        """Copy some bytes, at least one, and return their number; only an error of the last method is raised."""
        method = self._methods[0]
        try:
            done = method(self.source.fileno(), self.target.fileno(), piece)
        except (OSError, AttributeError):  # AttributeError: the system lacks the call
            if method is _through_memory:
                raise
            done = 0
        if not done and method is _through_memory:
            raise ResourceError(f"{self.source.name!r} was truncated while it was being read.", fix="Try again.")
        if not done and self._methods[0] is method:
            self._methods = self._methods[1:]
        return done


def _in_kernel(source: int, target: int, piece: Range) -> int:
    return os.copy_file_range(source, target, piece.length, piece.source, piece.target)


def _by_sendfile(source: int, target: int, piece: Range) -> int:
    with _seeking:
        os.lseek(target, piece.target, os.SEEK_SET)
        return os.sendfile(target, source, piece.source, piece.length)


def _through_memory(source: int, target: int, piece: Range) -> int:
    data = read_at(source, min(piece.length, _BUFFER), piece.source)
    write_at(target, data, piece.target)
    return len(data)


def read_at(file: int, count: int, offset: int) -> bytes:
    """Read up to `count` bytes at `offset`; fewer at the end of the file."""
    if hasattr(os, "pread"):
        return os.pread(file, count, offset)
    with _seeking:
        os.lseek(file, offset, os.SEEK_SET)
        return os.read(file, count)


def write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data).cast("B")
    while view:
        done = _write_some(file, view[: _WRITE - offset % _WRITE], offset)
        view, offset = view[done:], offset + done


def _write_some(file: int, data: memoryview, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(file, data, offset)
    with _seeking:
        os.lseek(file, offset, os.SEEK_SET)
        return os.write(file, data)
