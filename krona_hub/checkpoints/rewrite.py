"""Rewriting a safetensors file with some tensors changed: one pass, any size, little memory. Torch-free.

The old file is memory-mapped, so its pages belong to the system. All offsets of the new file are known in advance, so
threads write changed tensors and ranges of unchanged bytes in parallel.
"""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from krona_hub.checkpoints.atomic import atomic_file
from krona_hub.checkpoints.byte_ranges import Range, write_at
from krona_hub.checkpoints.digest import rest_sha256
from krona_hub.checkpoints.findings import quoted
from krona_hub.checkpoints.header import Header
from krona_hub.checkpoints.os_errors import fault
from krona_hub.checkpoints.parallel_write import FilePart, copied, fill, open_source
from krona_hub.checkpoints.relayout import FileLayout, new_size
from krona_hub.checkpoints.tensor_entries import TensorInfo
from krona_hub.checkpoints.workers import ByteCounter
from krona_hub.errors import IntegrityError, ResourceError

__all__ = ["ByteSink", "TensorChange", "check_space", "new_size", "rewrite"]

ByteSink = Callable[[int, memoryview], None]  # (byte offset within the tensor, bytes)


@dataclass(frozen=True)
class TensorChange:
    """A new dtype and new bytes for one tensor; its shape does not change."""

    info_dtype: str  # dtype in the output, as in the header: F16, F32, …
    produce: Callable[[memoryview, ByteSink], None]
    """Receives the old bytes (mapped, read-only, valid until it returns) and sends the new bytes in order.

    Called on any thread; the sink must be called on that thread only, and raises when the work must stop.
    """


def rewrite(
    header: Header,
    out: BinaryIO | Path,
    changes: Mapping[str, TensorChange],
    *,
    metadata: Mapping[str, str],
    data_hash: str | None = None,
    threads: int = 2,
    progress: ByteCounter | None = None,
    overwrite: bool = False,
) -> None:
    """Write the file of `header` to `out` with `changes` applied and with its metadata replaced by `metadata`.

    Tensors keep their order (unless a wider dtype would misalign one), and unchanged tensors keep their bytes. `out`
    is a path, which is written atomically, or a file open for reading and writing, which the caller makes atomic.
    `data_hash` names a metadata key that receives `0x` + the sha256 of all bytes after the header. `progress` receives
    the bytes written since its last call, `new_size` in total, and is never called concurrently.

    Raises IncompleteError if a changed tensor does not exist, IntegrityError if a `produce` sends too few or too many
    bytes, ResourceError if the disk is full; errors of a `produce` propagate unchanged.
    """
    layout = FileLayout.of(header, {name: change.info_dtype for name, change in changes.items()}, metadata, data_hash)
    if isinstance(out, Path):
        check_space(out.parent, len(layout.opening()) + layout.data_size)
        with atomic_file(out, overwrite=overwrite) as file:
            _write(layout, changes, file, threads, progress)
    else:
        _write(layout, changes, out, threads, progress)


def check_space(folder: Path, needed: int) -> None:
    """Raise ResourceError, stating how much is missing, if the disk of `folder` has less than `needed` bytes free."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise fault(error, folder) from None
    if free < needed:
        raise ResourceError(
            f"{str(folder)!r} needs {needed / 1e9:,.2f} GB, {(needed - free) / 1e9:,.2f} GB more than are free.",
            fix="Free up disk space, or write to another disk with -o.",
        )


def _write(
    layout: FileLayout, changes: Mapping[str, TensorChange], file: BinaryIO, threads: int, progress: ByteCounter | None
) -> None:
    opening, old = layout.opening(), layout.old
    with open_source(old.path, old.file_size) as source, _mapped(source) as mapped:
        writers = [
            _TensorWriter(
                name,
                change,
                _bytes_of(old.tensors[name], old.data_start),
                _bytes_of(layout.tensors[name], len(opening)),
            )
            for name, change in changes.items()
        ]
        parts = [FilePart(writer.new.start, partial(writer.write, mapped, file.fileno())) for writer in writers]
        parts += _unchanged(layout, changes, len(opening), source, file)
        fill(file, opening, len(opening) + layout.data_size, parts, threads=threads, progress=progress)
    if layout.data_hash:
        file.seek(len(opening))
        digest = rest_sha256(file)
        write_at(file.fileno(), layout.opening(f"0x{digest}"), 0)


@contextmanager
def _mapped(file: BinaryIO) -> Iterator[mmap.mmap]:
    """Map a file into memory; views that a `produce` keeps stay valid until it releases them."""
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        yield mapped
    finally:
        with suppress(BufferError):
            mapped.close()


def _unchanged(
    layout: FileLayout, changes: Mapping[str, TensorChange], opening: int, source: BinaryIO, target: BinaryIO
) -> list[FilePart]:
    """Return the copy tasks for all unchanged tensors; adjacent ones are merged."""
    ranges = [
        Range(layout.old.data_start + layout.old.tensors[name].start, opening + new.start, new.nbytes)
        for name, new in layout.tensors.items()
        if name not in changes
    ]
    return copied(source, target, ranges)


@dataclass(frozen=True)
class _TensorWriter:
    """Writes one changed tensor."""

    name: str
    change: TensorChange
    old: slice  # byte range in the old file
    new: slice  # byte range in the new file

    def write(self, mapped: mmap.mmap, file: int, report: ByteCounter) -> None:
        sent, length = 0, self.new.stop - self.new.start

        def sink(offset: int, data: memoryview) -> None:
            nonlocal sent
            if offset != sent or offset + data.nbytes > length:
                raise self._wrong_size(f"bytes {offset:,} to {offset + data.nbytes:,} were sent after {sent:,}")
            write_at(file, data, self.new.start + offset)
            sent += data.nbytes
            report(data.nbytes)

        with _pages(mapped, self.old) as old:
            self.change.produce(old, sink)
        if sent != length:
            raise self._wrong_size(f"{sent:,} bytes were sent")

    def _wrong_size(self, cause: str) -> IntegrityError:
        length = self.new.stop - self.new.start
        return IntegrityError(f"{quoted(self.name)} has {length:,} bytes, but {cause}.", fix="Please report this bug.")


def _bytes_of(info: TensorInfo, data_start: int) -> slice:
    return slice(data_start + info.start, data_start + info.end)


@contextmanager
def _pages(mapped: mmap.mmap, section: slice) -> Iterator[memoryview]:
    """Yield the bytes of `section`; advises the system to prefetch their pages and to unmap them afterwards."""
    start = section.start // mmap.PAGESIZE * mmap.PAGESIZE
    length = section.stop - start
    view = memoryview(mapped)[section]
    if length and hasattr(mmap, "MADV_WILLNEED"):
        mapped.madvise(mmap.MADV_WILLNEED, start, length)
    yield view
    if length and hasattr(mmap, "MADV_DONTNEED"):  # unmaps only: the page cache keeps the pages
        mapped.madvise(mmap.MADV_DONTNEED, start, length)
    with suppress(BufferError):
        view.release()
