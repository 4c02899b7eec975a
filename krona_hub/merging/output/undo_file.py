"""The undo file of a merge: what it replaced, byte for byte. Torch-free.

A safetensors file. Tensor `<i>.header` holds the bytes before the data of the i-th changed file (of an index file, all
of it), `<i>.tensor.<name>` a touched tensor as it was; the metadata `krona.undo` says which file that is, its size and
sha256, and the sha256 of what the merge made of each touched tensor, so that `unmerge` knows its own.
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
_BROKEN = "Give the file that `krona merge --undo` wrote."


@dataclass(frozen=True)
class Before:
    """A file as it was before the merge."""

    path: str  # relative to the folder, with /; of a lone file its name
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
    folder: bool  # a merged folder, not a lone file
    files: tuple[Before, ...]

    def opening(self, number: int) -> bytes:
        """The bytes before the data of a file, or a whole index file."""
        info = self.header.tensors[f"{number}.header"]
        with self.header.path.open("rb") as file:
            file.seek(self.header.data_start + info.start)
            return file.read(info.nbytes)

    def place(self, number: int, tensor: str) -> int:
        """Where in the undo file the bytes of a touched tensor begin."""
        return self.header.data_start + self.header.tensors[f"{number}.tensor.{tensor}"].start


@dataclass(frozen=True)
class Kept:
    """Bytes of the base that go into the undo file."""

    name: str  # of the tensor that they become
    stored: EncodedTensor
    path: Path
    size: int  # of the file at `path`
    offset: int  # in it


def kept(number: int, header: Header, tensors: Iterable[str]) -> Iterator[Kept]:
    """What the undo file keeps of the i-th changed file."""
    opening = EncodedTensor("U8", (header.data_start,), tuple)
    yield Kept(f"{number}.header", opening, header.path, header.file_size, 0)
    for name in tensors:
        info = header.tensors[name]
        stored = EncodedTensor(info.dtype, info.shape, tuple)
        yield Kept(f"{number}.tensor.{name}", stored, header.path, header.file_size, header.data_start + info.start)


def kept_index(number: int, path: Path) -> Kept:
    """What it keeps of an index file: everything."""
    size = path.stat().st_size
    return Kept(f"{number}.header", EncodedTensor("U8", (size,), tuple), path, size, 0)


def write_undo(
    path: Path,
    pieces: Sequence[Kept],
    files: Sequence[Before],
    place: MergeDestination,
    *,
    threads: int = 2,
    progress: ByteCounter | None = None,
) -> None:
    """Write the undo file of a merge at `place`, whole or not at all."""
    ordered = sorted(pieces, key=lambda piece: (-DTYPE_BITS[piece.stored.dtype], piece.name))
    record = {"version": VERSION, "folder": place.folder, "files": [asdict(file) for file in files]}
    opening = header_bytes([(p.name, p.stored) for p in ordered], {KEY: json.dumps(record, separators=(",", ":"))})
    starts = list(accumulate((piece.stored.nbytes for piece in ordered), initial=len(opening)))
    with ExitStack() as stack:
        file = stack.enter_context(atomic_file(path, overwrite=place.undo_overwrite))
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
    """The undo file at `path`. Raises FormatError for anything else, NewerSchemaError for one of a newer major."""
    header = read_header(path)
    if KEY not in header.metadata:
        raise FormatError(f"{path} is no undo file.", fix=_BROKEN)
    record = strict_json.parse(header.metadata[KEY])
    version = str(record.get("version"))
    if version.split(".")[0] != VERSION.split(".")[0]:
        raise NewerSchemaError(f"{path} is an undo file of version {version}.", fix="Update krona-hub.")
    try:
        files = tuple(_before(entry) for entry in record["files"])
        undo = Undo(header, bool(record["folder"]), files)
        complete = all(_names(i, file) <= header.tensors.keys() for i, file in enumerate(files))
    except (KeyError, TypeError, ValueError, AttributeError):
        complete = False
    if not complete or not (undo.folder or len(undo.files) == 1):
        raise FormatError(f"{path} is a broken undo file.", fix=_BROKEN)
    return undo


def _before(entry: Mapping[str, Any]) -> Before:
    """Raises ValueError for a path that leads out of the folder: the file may come from anybody."""
    path = PurePosixPath(entry["path"])
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ValueError(entry["path"])
    return Before(str(path), int(entry["size"]), str(entry["sha256"]), dict(entry["merged"]))


def _names(number: int, file: Before) -> set[str]:
    """The tensors that an undo file must have for a file."""
    return {f"{number}.header", *(f"{number}.tensor.{name}" for name in file.merged if name != INDEX)}


def parsed(opening: bytes) -> dict[str, TensorInfo]:
    """The tensors that the bytes before the data of a safetensors file promise."""
    fields = strict_json.parse(opening[8:])
    return {name: parse_entry(value) for name, value in fields.items() if name != "__metadata__"}
