"""A safetensors file written anew with some tensors changed: one pass, any size, little memory. Torch-free.

The old file is mapped, so that its pages belong to the system; the new one is written at offsets that are known
before, so that threads do tensors and stretches of untouched bytes side by side.
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

ByteSink = Callable[[int, memoryview], None]  # (byte offset inside the tensor, bytes)


@dataclass(frozen=True)
class TensorChange:
    """What becomes of a tensor; its shape stays."""

    info_dtype: str  # the dtype it has in the output, as in the header: F16, F32, …
    produce: Callable[[memoryview, ByteSink], None]
    """Gets the old bytes (mapped, read-only, valid until it returns) and sends those of the new tensor in their order.

    Called on any thread; the sink may be called from that thread only, and raises when the work is to stop.
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
    """Write the file of `header` to `out` with `changes` made and with `metadata` in place of its own.

    Tensors keep their order (unless a wider dtype would leave one misaligned) and untouched ones their bytes. `out`
    is a path, which then appears whole by rename, or a file open for reading and writing, which the caller makes so.
    `data_hash` names a metadata key that receives `0x` + the sha256 of all bytes after the header. `progress` gets
    the bytes written since its last call, `new_size` in sum, and is never called twice at a time.

    Raises IncompleteError for a change of a tensor that is not there, IntegrityError where a `produce` sends too few
    or too many bytes, ResourceError for a full disk; the error of a `produce` comes out as it is.
    """
    layout = FileLayout.of(header, {name: change.info_dtype for name, change in changes.items()}, metadata, data_hash)
    if isinstance(out, Path):
        check_space(out.parent, len(layout.opening()) + layout.data_size)
        with atomic_file(out, overwrite=overwrite) as file:
            _write(layout, changes, file, threads, progress)
    else:
        _write(layout, changes, out, threads, progress)


def check_space(folder: Path, needed: int) -> None:
    """Raise ResourceError, with how much is missing, where `folder`'s disk has less than `needed` bytes free."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise fault(error, folder) from None
    if free < needed:
        raise ResourceError(
            f"{str(folder)!r} needs {needed / 1e9:,.2f} GB, {(needed - free) / 1e9:,.2f} GB more than are free there.",
            fix="Free some space, or write to another disk with -o.",
        )


def _write(
    layout: FileLayout, changes: Mapping[str, TensorChange], file: BinaryIO, threads: int, progress: ByteCounter | None
) -> None:
    opening, old = layout.opening(), layout.old
    with open_source(old.path, old.file_size) as source, _mapped(source) as mapped:
        makings = [
            _Making(name, change, _of(old.tensors[name], old.data_start), _of(layout.tensors[name], len(opening)))
            for name, change in changes.items()
        ]
        parts = [FilePart(making.new.start, partial(making.write, mapped, file.fileno())) for making in makings]
        parts += _untouched(layout, changes, len(opening), source, file)
        fill(file, opening, len(opening) + layout.data_size, parts, threads=threads, progress=progress)
    if layout.data_hash:
        file.seek(len(opening))
        digest = rest_sha256(file)
        write_at(file.fileno(), layout.opening(f"0x{digest}"), 0)


@contextmanager
def _mapped(file: BinaryIO) -> Iterator[mmap.mmap]:
    """The bytes of the file. What a `produce` still holds of them lives on until it lets go."""
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        yield mapped
    finally:
        with suppress(BufferError):
            mapped.close()


def _untouched(
    layout: FileLayout, changes: Mapping[str, TensorChange], opening: int, source: BinaryIO, target: BinaryIO
) -> list[FilePart]:
    """The work for all tensors without a change, neighbours together."""
    ranges = [
        Range(layout.old.data_start + layout.old.tensors[name].start, opening + new.start, new.nbytes)
        for name, new in layout.tensors.items()
        if name not in changes
    ]
    return copied(source, target, ranges)


@dataclass(frozen=True)
class _Making:
    """The work of making one changed tensor."""

    name: str
    change: TensorChange
    old: slice  # of the old file
    new: slice  # of the new file

    def write(self, mapped: mmap.mmap, file: int, report: ByteCounter) -> None:
        sent, length = 0, self.new.stop - self.new.start

        def sink(offset: int, data: memoryview) -> None:
            nonlocal sent
            if offset != sent or offset + data.nbytes > length:
                raise self._wrong(f"bytes {offset:,} to {offset + data.nbytes:,} were sent after {sent:,}")
            write_at(file, data, self.new.start + offset)
            sent += data.nbytes
            report(data.nbytes)

        with _pages(mapped, self.old) as old:
            self.change.produce(old, sink)
        if sent != length:
            raise self._wrong(f"{sent:,} bytes were sent")

    def _wrong(self, cause: str) -> IntegrityError:
        length = self.new.stop - self.new.start
        return IntegrityError(f"{quoted(self.name)} has {length:,} bytes, but {cause}.", fix="Please report this bug.")


def _of(info: TensorInfo, data_start: int) -> slice:
    return slice(data_start + info.start, data_start + info.end)


@contextmanager
def _pages(mapped: mmap.mmap, place: slice) -> Iterator[memoryview]:
    """The bytes at `place`; the system is told to fetch their pages before and to forget the mapping after."""
    start = place.start // mmap.PAGESIZE * mmap.PAGESIZE
    length = place.stop - start
    view = memoryview(mapped)[place]
    if length and hasattr(mmap, "MADV_WILLNEED"):
        mapped.madvise(mmap.MADV_WILLNEED, start, length)
    yield view
    if length and hasattr(mmap, "MADV_DONTNEED"):  # unmaps only: the page cache keeps what it holds
        mapped.madvise(mmap.MADV_DONTNEED, start, length)
    with suppress(BufferError):
        view.release()
