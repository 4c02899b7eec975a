"""Pair the tensors of two checkpoints by name, also between a file and a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from krona_hub.checkpoints.header import Header, TensorInfo, read_header
from krona_hub.errors import NotFoundError

WEIGHTS = ".safetensors"


class LocatedTensor(NamedTuple):
    """A tensor in a file of a checkpoint."""

    file: str  # relative to the checkpoint; the name of a single file
    tensor: str
    header: Header

    @property
    def info(self) -> TensorInfo:
        return self.header.tensors[self.tensor]


class TensorPair(NamedTuple):
    """A tensor of the base and its counterpart; one of the two may be missing."""

    base: LocatedTensor | None
    merged: LocatedTensor | None

    @property
    def present(self) -> tuple[LocatedTensor, ...]:
        """The existing tensors, the base first."""
        return tuple(s for s in (self.base, self.merged) if s is not None)

    @property
    def nbytes(self) -> int:
        return max(s.info.nbytes for s in self.present)


def headers_of(source: Path) -> dict[str, Header]:
    """Read the headers of a checkpoint file, or of all in a folder. Raises NotFoundError if there are none."""
    if source.is_file():
        return {source.name: read_header(source)}
    files = [p for p in sorted(source.rglob(f"*{WEIGHTS}")) if not _hidden(p.relative_to(source))]
    if not files:
        raise NotFoundError(
            f"{source} contains no safetensors files.", fix="Specify a checkpoint file or a diffusers folder."
        )
    return {p.relative_to(source).as_posix(): read_header(p) for p in files}


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def pairs(base: Mapping[str, Header], merged: Mapping[str, Header]) -> Iterator[TensorPair]:
    """Yield every tensor of the base with its counterpart, then those that only the merged checkpoint has.

    A counterpart has the same name and is in the file of the same name, else in the same folder, else (if one of the
    two checkpoints is a single file) anywhere.
    """
    by_name: dict[str, list[LocatedTensor]] = {}
    for stored in _tensors(merged):
        by_name.setdefault(stored.tensor, []).append(stored)
    anywhere, taken = 1 in (len(base), len(merged)), set()
    for stored in _tensors(base):
        found = _counterpart(stored, by_name.get(stored.tensor, ()), anywhere)
        if found is not None:
            taken.add((found.file, found.tensor))
        yield TensorPair(stored, found)
    for stored in _tensors(merged):
        if (stored.file, stored.tensor) not in taken:
            yield TensorPair(None, stored)


def _tensors(headers: Mapping[str, Header]) -> Iterator[LocatedTensor]:
    """Yield the tensors in file order, so that reading is sequential."""
    for file, header in headers.items():
        for tensor in sorted(header.tensors, key=lambda t: header.tensors[t].start):
            yield LocatedTensor(file, tensor, header)


def _counterpart(wanted: LocatedTensor, found: list[LocatedTensor] | tuple[()], anywhere: bool) -> LocatedTensor | None:
    same = [s for s in found if s.file == wanted.file]
    beside = [s for s in found if PurePosixPath(s.file).parent == PurePosixPath(wanted.file).parent]
    return next(iter([*same, *beside, *(found if anywhere else ())]), None)
