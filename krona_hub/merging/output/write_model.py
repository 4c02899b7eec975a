"""Write the output of a merge in the layout of its input: a file, a folder, or the base itself in place.

Untouched files are copied or linked; the output is atomic: it appears as a whole, by rename. Torch-free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from krona_hub.checkpoints.digest import file_sha256
from krona_hub.checkpoints.header import Header
from krona_hub.checkpoints.relayout import FileLayout, new_size
from krona_hub.checkpoints.rewrite import ByteSink, TensorChange, check_space, rewrite
from krona_hub.checkpoints.workers import ByteCounter
from krona_hub.merging.output.destination import MergeDestination, Output, check_destination, opened
from krona_hub.merging.output.model_folder import copy_files, files_below, indices, stale
from krona_hub.merging.output.undo_file import INDEX, Before, Kept, kept, kept_index, write_undo

__all__ = ["MergedFile", "MergeDestination", "Written", "bytes_to_write", "check_destination", "write_merged"]


@dataclass(frozen=True)
class MergedFile:
    """A file of the base and its changes."""

    header: Header  # of the base itself, or a file in it
    changes: Mapping[str, TensorChange]
    metadata: Mapping[str, str]  # of the output
    data_hash: str | None = None  # as in `rewrite`
    sha256: str | None = None  # of the original file, if known; an undo file needs it

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: change.info_dtype for name, change in self.changes.items()}


class Written(NamedTuple):
    """What was written."""

    files: tuple[Path, ...]  # with merged tensors
    copied: tuple[Path, ...]  # unchanged copies, or links
    left_out: tuple[Path, ...]  # relative to the base: pickles and other weights that the merge makes stale
    nbytes: int  # written


def bytes_to_write(destination: MergeDestination, files: Sequence[MergedFile]) -> int:
    """Return the bytes that `write_merged` will write, undo file included: the total of `progress`, to a few kB.

    When an output is overwritten, old and new exist side by side for a while: this much space must be free.
    """
    work = _Work.of(destination, files)
    return work.output_size + work.undo_size


def write_merged(
    destination: MergeDestination, files: Sequence[MergedFile], *, threads: int = 2, progress: ByteCounter | None = None
) -> Written:
    """Write the merged files, copies of the untouched ones and, before these appear, the undo file.

    Calls `check_destination` and checks the free space first. `*.index.json` files of changed shards get the correct
    `total_size`. Links in the base are followed: the output contains files. Pickles and other copies of changed
    weights are omitted (in place: kept), as are `.git` and download caches.
    """
    check_destination(destination, [file.header.path for file in files])
    work = _Work.of(destination, files)
    work.check_space()
    merged: list[dict[str, str]] = [{} for _ in files]
    with _hashes(files if destination.undo else ()) as hashes, opened(destination) as output:
        for file, digests in zip(files, merged, strict=True):
            _write_file(destination, file, digests, output, threads, progress)
        for relative, text in work.indices.items():
            with output.create(relative) as index:
                index.write(text)
        copy_files(destination.base, work.untouched, output, link=destination.link, threads=threads, progress=progress)
        if destination.undo:
            befores = [*_befores(destination, files, hashes, merged), *work.index_befores()]
            write_undo(destination.undo, work.kept, befores, destination, threads=threads, progress=progress)
    return work.written()


def _write_file(
    destination: MergeDestination,
    file: MergedFile,
    digests: dict[str, str],
    output: Output,
    threads: int,
    progress: ByteCounter | None,
) -> None:
    changes = file.changes
    if destination.undo:
        changes = {name: _watched(change, name, digests) for name, change in changes.items()}
    with output.create(destination.relative(file.header.path)) as target:
        rewrite(
            file.header, target, changes, metadata=file.metadata, data_hash=file.data_hash,
            threads=threads, progress=progress,
        )  # fmt: skip


def _watched(change: TensorChange, name: str, digests: dict[str, str]) -> TensorChange:
    """Return the same change, recording the sha256 of its output under its name."""

    def produce(old: memoryview, sink: ByteSink) -> None:
        digest = hashlib.sha256()

        def tap(offset: int, data: memoryview) -> None:
            digest.update(data)
            sink(offset, data)

        change.produce(old, tap)
        digests[name] = digest.hexdigest()

    return replace(change, produce=produce)


@contextmanager
def _hashes(files: Sequence[MergedFile]) -> Iterator[list[Future[str]]]:
    """Compute the sha256 of each original file in the background."""
    with ThreadPoolExecutor(1) as pool:
        try:
            yield [pool.submit(_sha256, file) for file in files]
        finally:
            pool.shutdown(cancel_futures=True)


def _sha256(file: MergedFile) -> str:
    return file.sha256 or file_sha256(file.header.path)


def _befores(
    destination: MergeDestination,
    files: Sequence[MergedFile],
    hashes: Sequence[Future[str]],
    merged: Sequence[Mapping[str, str]],
) -> Iterator[Before]:
    for file, sha256, digests in zip(files, hashes, merged, strict=True):
        path = destination.relative(file.header.path).as_posix()
        in_order = {name: digests[name] for name in file.changes}  # not the order in which threads finish
        yield Before(path, file.header.file_size, sha256.result(), in_order)


@dataclass(frozen=True)
class _Work:
    """Everything that a merge will write; paths are relative to the base."""

    destination: MergeDestination
    files: Sequence[MergedFile]
    indices: Mapping[Path, bytes]  # with a new total size
    untouched: Sequence[Path]
    left_out: Sequence[Path]

    @classmethod
    def of(cls, destination: MergeDestination, files: Sequence[MergedFile]) -> _Work:
        if not destination.folder:
            return cls(destination, files, {}, (), ())
        changed = {destination.relative(file.header.path): file for file in files}
        indices_ = indices(destination.base, {path: _growth(file) for path, file in changed.items()})
        tree = files_below(destination.base)
        left_out = stale(tree, changed)
        known = {*changed, *indices_, *left_out}
        untouched = [path for path in tree if path not in known] if destination.out else []
        return cls(destination, files, indices_, untouched, left_out)

    @property
    def output_size(self) -> int:
        """Bytes, without links."""
        sizes = [new_size(f.header, f.dtypes, metadata=f.metadata, data_hash=f.data_hash) for f in self.files]
        copies = () if self.destination.link else self.untouched
        return sum(sizes) + sum((self.destination.base / path).stat().st_size for path in copies)

    @property
    def undo_size(self) -> int:
        return sum(piece.stored.nbytes for piece in self.kept) if self.destination.undo else 0

    @property
    def kept(self) -> list[Kept]:
        """Content of the undo file: first of the changed files, then of the indices."""
        pieces = [piece for i, file in enumerate(self.files) for piece in kept(i, file.header, file.changes)]
        paths = [self.destination.base / path for path in self.indices]
        return pieces + [kept_index(i, path) for i, path in enumerate(paths, len(self.files))]

    def index_befores(self) -> Iterator[Before]:
        for path, text in self.indices.items():
            old = (self.destination.base / path).read_bytes()
            after = {INDEX: hashlib.sha256(text).hexdigest()}
            yield Before(path.as_posix(), len(old), hashlib.sha256(old).hexdigest(), after)

    def check_space(self) -> None:
        """Raise ResourceError if a disk has too little space."""
        destination = self.destination
        if destination.undo and destination.undo.parent.stat().st_dev == destination.home.stat().st_dev:
            check_space(destination.home, self.output_size + self.undo_size)
            return
        check_space(destination.home, self.output_size)
        if destination.undo:
            check_space(destination.undo.parent, self.undo_size)

    def written(self) -> Written:
        root = self.destination.out or self.destination.base
        files = [self.destination.relative(file.header.path) for file in self.files]
        paths = [root / path if self.destination.folder else root for path in files]
        copied = tuple(root / path for path in self.untouched)
        return Written(tuple(paths), copied, tuple(self.left_out), self.output_size + self.undo_size)


def _growth(file: MergedFile) -> int:
    """Return the bytes by which the tensors grow."""
    layout = FileLayout.of(file.header, file.dtypes, {})
    return layout.data_size - (file.header.file_size - file.header.data_start)
