"""The undo file of a merge: the replaced bytes. Torch-free.

It is a safetensors file. Tensor `<i>.header` contains the bytes before the data of the i-th changed file (for an index
file, the whole file), `<i>.tensor.<name>` the original bytes of a touched tensor; the metadata `krona.undo` records the
path, size and sha256 of each file, and the sha256 of each touched tensor after the merge, so that `unmerge` can verify
its input.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from krona_hub.checkpoints import strict_json
from krona_hub.checkpoints.atomic import atomic_file
from krona_hub.checkpoints.byte_ranges import Range
from krona_hub.checkpoints.header import Header, read_header
from krona_hub.checkpoints.parallel_write import FilePart, copied, fill, open_source
from krona_hub.checkpoints.tensor_entries import DTYPE_BITS, TensorInfo, parse_entry
from krona_hub.checkpoints.workers import ByteCounter
from krona_hub.checkpoints.writer import EncodedTensor, header_bytes
from krona_hub.errors import FormatError, NewerSchemaError
from krona_hub.merging.output.destination import MergeDestination

KEY = "krona.undo"
VERSION = "1.0"
INDEX = ""  # in place of a tensor's name: the sha256 of an index file after the merge
_BROKEN = "Specify the file that `krona merge --undo` wrote."


@dataclass(frozen=True)
class Before:
    """A file before the merge."""

    path: str  # relative to the folder, with /; the name of a single file
    size: int  # bytes
    sha256: str
    merged: Mapping[str, str]  # touched tensor -> sha256 of its bytes after the merge

    @property
    def is_index(self) -> bool:
        return INDEX in self.merged


@dataclass(frozen=True)
class Undo:
    """An undo file."""

    header: Header
    folder: bool  # whether a folder was merged, not a single file
    files: tuple[Before, ...]

    def opening(self, number: int) -> bytes:
        """Return the bytes before the data of a file, or a whole index file."""
        info = self.header.tensors[f"{number}.header"]
        with self.header.path.open("rb") as file:
            file.seek(self.header.data_start + info.start)
            return file.read(info.nbytes)

    def offset(self, number: int, tensor: str) -> int:
        """Return the position in the undo file of the bytes of a touched tensor."""
        return self.header.data_start + self.header.tensors[f"{number}.tensor.{tensor}"].start


@dataclass(frozen=True)
class Kept:
    """Bytes of the base that the undo file stores."""

    name: str  # of their tensor in the undo file
    stored: EncodedTensor
    path: Path
    size: int  # of the file at `path`
    offset: int  # in it


def kept(number: int, header: Header, tensors: Iterable[str]) -> Iterator[Kept]:
    """Yield what the undo file stores of the i-th changed file."""
    opening = EncodedTensor("U8", (header.data_start,), tuple)
    yield Kept(f"{number}.header", opening, header.path, header.file_size, 0)
    for name in tensors:
        info = header.tensors[name]
        stored = EncodedTensor(info.dtype, info.shape, tuple)
        yield Kept(f"{number}.tensor.{name}", stored, header.path, header.file_size, header.data_start + info.start)


def kept_index(number: int, path: Path) -> Kept:
    """Return what the undo file stores of an index file: all of it."""
    size = path.stat().st_size
    return Kept(f"{number}.header", EncodedTensor("U8", (size,), tuple), path, size, 0)


def write_undo(
    path: Path,
    pieces: Sequence[Kept],
    files: Sequence[Before],
    destination: MergeDestination,
    *,
    threads: int = 2,
    progress: ByteCounter | None = None,
) -> None:
    """Write the undo file of a merge at `destination`, atomically."""
    ordered = sorted(pieces, key=lambda piece: (-DTYPE_BITS[piece.stored.dtype], piece.name))
    record = {"version": VERSION, "folder": destination.folder, "files": [asdict(file) for file in files]}
    opening = header_bytes([(p.name, p.stored) for p in ordered], {KEY: json.dumps(record, separators=(",", ":"))})
    starts = list(accumulate((piece.stored.nbytes for piece in ordered), initial=len(opening)))
    with ExitStack() as stack:
        file = stack.enter_context(atomic_file(path, overwrite=destination.undo_overwrite))
        parts: list[FilePart] = []
        for source in {piece.path: piece for piece in ordered}.values():
            opened = stack.enter_context(open_source(source.path, source.size))
            of_this = [
                Range(p.offset, start, p.stored.nbytes)
                for p, start in zip(ordered, starts[:-1], strict=True)
                if p.path == source.path
            ]
            parts += copied(opened, file, of_this)
        fill(file, opening, starts[-1], parts, threads=threads, progress=progress)


def read_undo(path: Path) -> Undo:
    """Read the undo file at `path`. Raises FormatError for other files, NewerSchemaError for a newer major version."""
    header = read_header(path)
    if KEY not in header.metadata:
        raise FormatError(f"{path} is not an undo file.", fix=_BROKEN)
    record = strict_json.parse(header.metadata[KEY])
    version = str(record.get("version"))
    if version.split(".")[0] != VERSION.split(".")[0]:
        raise NewerSchemaError(f"{path} is an undo file of the newer version {version}.", fix="Update krona-hub.")
    try:
        files = tuple(_before(entry) for entry in record["files"])
        undo = Undo(header, bool(record["folder"]), files)
        complete = all(_names(i, file) <= header.tensors.keys() for i, file in enumerate(files))
    except (KeyError, TypeError, ValueError, AttributeError):
        complete = False
    if not complete or not (undo.folder or len(undo.files) == 1):
        raise FormatError(f"{path} is a corrupt undo file.", fix=_BROKEN)
    return undo


def _before(entry: Mapping[str, Any]) -> Before:
    """Parse an entry. Raises ValueError for a path outside the folder: undo files are untrusted input."""
    path = PurePosixPath(entry["path"])
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ValueError(entry["path"])
    return Before(str(path), int(entry["size"]), str(entry["sha256"]), dict(entry["merged"]))


def _names(number: int, file: Before) -> set[str]:
    """Return the tensors that an undo file must contain for a file."""
    return {f"{number}.header", *(f"{number}.tensor.{name}" for name in file.merged if name != INDEX)}


def parsed(opening: bytes) -> dict[str, TensorInfo]:
    """Return the tensors declared in the header bytes of a safetensors file."""
    fields = strict_json.parse(opening[8:])
    return {name: parse_entry(value) for name, value in fields.items() if name != "__metadata__"}
