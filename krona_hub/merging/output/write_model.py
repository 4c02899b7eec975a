"""The output of a merge has the layout of its input: a file, a folder of files, or the base itself in place.

Files that no adapter touches are copied or linked; everything appears at once, by rename, or not at all. Torch-free.
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
from krona_hub.merging.output.destination import MergeDestination, Output, check_place, opened
from krona_hub.merging.output.model_folder import copy_files, files_below, indices, stale
from krona_hub.merging.output.undo_file import INDEX, Before, Kept, kept, kept_index, write_undo

__all__ = ["MergedFile", "MergeDestination", "Written", "bytes_to_write", "check_place", "write_merged"]


@dataclass(frozen=True)
class MergedFile:
    """A file of the base and what becomes of it."""

    header: Header  # its path is the base itself, or below it
    changes: Mapping[str, TensorChange]
    metadata: Mapping[str, str]  # of the output
    data_hash: str | None = None  # as in `rewrite`
    sha256: str | None = None  # of the file as it is, where that is known; an undo file needs it

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: change.info_dtype for name, change in self.changes.items()}


class Written(NamedTuple):
    """What was written."""

    files: tuple[Path, ...]  # with merged tensors
    copied: tuple[Path, ...]  # as they were, or linked
    left_out: tuple[Path, ...]  # relative to the base: pickles and other weights that the merge made stale
    nbytes: int  # written


def bytes_to_write(place: MergeDestination, files: Sequence[MergedFile]) -> int:
    """All bytes that `write_merged` will write, undo file included: what `progress` gets in sum, to a few kB.

    Where an output is overwritten, old and new lie side by side for a while: this much must be free.
    """
    work = _Work.of(place, files)
    return work.output_size + work.undo_size


def write_merged(
    place: MergeDestination, files: Sequence[MergedFile], *, threads: int = 2, progress: ByteCounter | None = None
) -> Written:
    """Write the merged files, the untouched ones beside them, and before they appear the undo file.

    Calls `check_place` and checks the free space first. `*.index.json` files of changed shards keep a right
    `total_size`. Links in the base are followed: the output holds files. Pickles and other twins beside changed
    weights are left out (in place: stay), `.git` and download caches too.
    """
    check_place(place, [file.header.path for file in files])
    work = _Work.of(place, files)
    work.check_space()
    merged: list[dict[str, str]] = [{} for _ in files]
    with _hashes(files if place.undo else ()) as hashes, opened(place) as output:
        for file, digests in zip(files, merged, strict=True):
            _write_file(place, file, digests, output, threads, progress)
        for relative, text in work.indices.items():
            with output.create(relative) as index:
                index.write(text)
        copy_files(place.base, work.untouched, output, link=place.link, threads=threads, progress=progress)
        if place.undo:
            befores = [*_befores(place, files, hashes, merged), *work.index_befores()]
            write_undo(place.undo, work.kept, befores, place, threads=threads, progress=progress)
    return work.written()


def _write_file(
    place: MergeDestination,
    file: MergedFile,
    digests: dict[str, str],
    output: Output,
    threads: int,
    progress: ByteCounter | None,
) -> None:
    changes = file.changes
    if place.undo:
        changes = {name: _watched(change, name, digests) for name, change in changes.items()}
    with output.create(place.relative(file.header.path)) as target:
        rewrite(
            file.header, target, changes, metadata=file.metadata, data_hash=file.data_hash,
            threads=threads, progress=progress,
        )  # fmt: skip


def _watched(change: TensorChange, name: str, digests: dict[str, str]) -> TensorChange:
    """The same change, with the sha256 of what it makes noted under its name."""

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
    """The sha256 of each file as it is, found while others work."""
    with ThreadPoolExecutor(1) as pool:
        try:
            yield [pool.submit(_sha256, file) for file in files]
        finally:
            pool.shutdown(cancel_futures=True)


def _sha256(file: MergedFile) -> str:
    return file.sha256 or file_sha256(file.header.path)


def _befores(
    place: MergeDestination,
    files: Sequence[MergedFile],
    hashes: Sequence[Future[str]],
    merged: Sequence[Mapping[str, str]],
) -> Iterator[Before]:
    for file, sha256, digests in zip(files, hashes, merged, strict=True):
        path = place.relative(file.header.path).as_posix()
        in_order = {name: digests[name] for name in file.changes}  # not the order in which threads ended
        yield Before(path, file.header.file_size, sha256.result(), in_order)


@dataclass(frozen=True)
class _Work:
    """All that a merge writes, known before any of it is written; paths are relative to the base."""

    place: MergeDestination
    files: Sequence[MergedFile]
    indices: Mapping[Path, bytes]  # with a new total size
    untouched: Sequence[Path]
    left_out: Sequence[Path]

    @classmethod
    def of(cls, place: MergeDestination, files: Sequence[MergedFile]) -> _Work:
        if not place.folder:
            return cls(place, files, {}, (), ())
        changed = {place.relative(file.header.path): file for file in files}
        indices_ = indices(place.base, {path: _growth(file) for path, file in changed.items()})
        tree = files_below(place.base)
        left_out = stale(tree, changed)
        known = {*changed, *indices_, *left_out}
        untouched = [path for path in tree if path not in known] if place.out else []
        return cls(place, files, indices_, untouched, left_out)

    @property
    def output_size(self) -> int:
        """Bytes, links not counted."""
        sizes = [new_size(f.header, f.dtypes, metadata=f.metadata, data_hash=f.data_hash) for f in self.files]
        copies = () if self.place.link else self.untouched
        return sum(sizes) + sum((self.place.base / path).stat().st_size for path in copies)

    @property
    def undo_size(self) -> int:
        return sum(piece.stored.nbytes for piece in self.kept) if self.place.undo else 0

    @property
    def kept(self) -> list[Kept]:
        """What goes into the undo file: of the changed files, then of the indices."""
        pieces = [piece for i, file in enumerate(self.files) for piece in kept(i, file.header, file.changes)]
        paths = [self.place.base / path for path in self.indices]
        return pieces + [kept_index(i, path) for i, path in enumerate(paths, len(self.files))]

    def index_befores(self) -> Iterator[Before]:
        for path, text in self.indices.items():
            old = (self.place.base / path).read_bytes()
            after = {INDEX: hashlib.sha256(text).hexdigest()}
            yield Before(path.as_posix(), len(old), hashlib.sha256(old).hexdigest(), after)

    def check_space(self) -> None:
        """Raise ResourceError where a disk has too little room."""
        place = self.place
        if place.undo and place.undo.parent.stat().st_dev == place.home.stat().st_dev:
            check_space(place.home, self.output_size + self.undo_size)
            return
        check_space(place.home, self.output_size)
        if place.undo:
            check_space(place.undo.parent, self.undo_size)

    def written(self) -> Written:
        root = self.place.out or self.place.base
        files = [self.place.relative(file.header.path) for file in self.files]
        paths = [root / path if self.place.folder else root for path in files]
        copied = tuple(root / path for path in self.untouched)
        return Written(tuple(paths), copied, tuple(self.left_out), self.output_size + self.undo_size)


def _growth(file: MergedFile) -> int:
    """Bytes that the tensors take more than before."""
    layout = FileLayout.of(file.header, file.dtypes, {})
    return layout.data_size - (file.header.file_size - file.header.data_start)
