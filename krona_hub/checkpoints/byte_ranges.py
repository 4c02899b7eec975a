"""Byte ranges from one open file to another, by the fastest means that both file systems allow. Torch-free."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from krona_hub.errors import ResourceError

CHUNK = 1 << 24  # bytes copied in one go: large enough to be fast, small enough to stop and to share out
_BUFFER = 1 << 18  # bytes held by a copy through memory
_WRITE = 1 << 16  # bytes per call. Large ones make the system look for large pages, which costs up to four times as
# much on virtual machines that hand free memory back to their host, and gains nothing elsewhere (measured on ext4)
_seeking = threading.Lock()  # a file has one position, which threads would move under each other


class Range(NamedTuple):
    """`length` bytes, from where they are to where they go."""

    source: int  # bytes from the start of the file
    target: int
    length: int


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes in as few ranges as there are, where one follows the other in both files; empty ones left out.

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
    """The range in parts of at most `size` bytes, cut where the target reaches a multiple of it.

    Writes that begin at round places fill whole pages, and large ones: on ext4 that halves the time of a copy.

    >>> [(c.target, c.length) for c in chunks(Range(0, 3, 8), 4)]
    [(3, 1), (4, 4), (8, 3)]
    """
    source, target, end = piece.source, piece.target, piece.target + piece.length
    while target < end:
        length = min(size - target % size, end - target)
        yield Range(source, target, length)
        source, target = source + length, target + length


class Copier:
    """Copies ranges from one open file to another; several threads may use one.

    In the kernel where it can (`copy_file_range`, which may share blocks instead of copying; `sendfile` where that is
    refused, as between two file systems), else through memory. What failed once for this pair is not tried again.
    """

    def __init__(self, source: BinaryIO, target: BinaryIO) -> None:
        self.source, self.target = source, target
        self._ways = [_in_kernel, _by_sendfile, _through_memory]

    def copy(self, piece: Range) -> None:
        """Raises OSError where the disk is full or broken, ResourceError where the source ends too early."""
        while piece.length:
            done = self._some(piece)
            piece = Range(piece.source + done, piece.target + done, piece.length - done)

    def _some(self, piece: Range) -> int:
        """Bytes copied, at least one. Only the last way is believed when it fails."""
        way = self._ways[0]
        try:
            done = way(self.source.fileno(), self.target.fileno(), piece)
        except (OSError, AttributeError):  # an AttributeError: a system without that call
            if way is _through_memory:
                raise
            done = 0
        if not done and way is _through_memory:
            raise ResourceError(f"{self.source.name!r} shrank while it was read.", fix="Try again.")
        if not done and self._ways[0] is way:
            self._ways = self._ways[1:]
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
    """Up to `count` bytes from `offset` on; fewer at the end of the file."""
    if hasattr(os, "pread"):
        return os.pread(file, count, offset)
    with _seeking:
        os.lseek(file, offset, os.SEEK_SET)
        return os.read(file, count)


def write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data` at `offset`."""
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
