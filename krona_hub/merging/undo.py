"""The way back from a merge: the base's files, byte for byte. Torch-free."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import BinaryIO, NamedTuple

from krona_hub.checkpoints.byte_ranges import Range, read_at
from krona_hub.checkpoints.digest import file_sha256, rest_sha256
from krona_hub.checkpoints.findings import quoted
from krona_hub.checkpoints.header import Header, read_header
from krona_hub.checkpoints.parallel_write import copied, fill, open_source
from krona_hub.checkpoints.rewrite import check_space
from krona_hub.checkpoints.workers import ByteCounter, run_tasks
from krona_hub.errors import ConflictError, IntegrityError, NotFoundError, UsageError
from krona_hub.merging.output.destination import MergeDestination, check_apart, check_changeable, check_new, opened
from krona_hub.merging.output.model_folder import copy_files, files_below
from krona_hub.merging.output.undo_file import INDEX, Before, Undo, parsed, read_undo

_PIECE = 1 << 20  # bytes hashed in one go


class UnmergeReport(NamedTuple):
    """What was restored, every file checked by its sha256."""

    out: Path
    restored: tuple[Path, ...]  # files that were merged and are now the base's again
    unchanged: tuple[Path, ...]  # files of the undo that were the base's already (an interrupted merge in place)
    copied: tuple[Path, ...]  # other files of the folder
    nbytes: int  # written
    seconds: float


def unmerge(
    merged: str | Path,
    undo: str | Path,
    out: str | Path | None = None,
    *,
    in_place: bool = False,
    overwrite: bool = False,
    threads: int = 2,
    progress: ByteCounter | None = None,
) -> UnmergeReport:
    """Restore the base from a merged file or folder and the undo file of that merge, at `out` or in place.

    Raises IntegrityError where `merged` is not what that merge wrote or where the result is not the base,
    FormatError for a file that is no undo file; UsageError without `out` and `in_place`.
    """
    started = perf_counter()
    work = _Work.of(Path(merged), Path(undo), _target(out, in_place), overwrite, threads)
    check_space(work.home, work.nbytes)
    with opened(work.place) as output:
        for number in work.merged:
            before = work.undo.files[number]
            with output.create(Path(before.path)) as file:
                _restore(work.undo, number, _path(work.place, before), file, threads, progress)
        copy_files(work.place.base, work.copied, output, threads=threads, progress=progress)
    return work.report(perf_counter() - started)


def _target(out: str | Path | None, in_place: bool) -> Path | None:
    if (out is None) != in_place:
        raise UsageError("say where to restore: to a new place or in place.", fix="Give -o OUT, or --in-place.")
    return None if out is None else Path(out)


@dataclass(frozen=True)
class _Work:
    """What is to be restored, and what is to be copied beside it."""

    place: MergeDestination  # its base is what was merged
    undo: Undo
    merged: tuple[int, ...]  # the files of the undo that are merged still
    others: tuple[Path, ...]  # relative: of the folder, and not of the undo

    @classmethod
    def of(cls, merged: Path, undo: Path, out: Path | None, overwrite: bool, threads: int) -> _Work:
        """Everything checked that can be before work. Raises as `unmerge` does."""
        record, place = read_undo(undo), MergeDestination(merged, out, overwrite=overwrite)
        _check_kind(merged, record)
        files = [_path(place, before) for before in record.files]
        if out is None:
            check_changeable(files)
        else:
            check_new(place, out)
            check_apart(undo, out)
        states = [_is_merged(record, i, path, threads) for i, path in enumerate(files)]
        known = {Path(before.path) for before in record.files}
        others = [path for path in files_below(merged) if path not in known] if out and place.folder else []
        return cls(place, record, tuple(i for i, state in enumerate(states) if state), tuple(others))

    @property
    def unchanged(self) -> list[Path]:
        return [Path(before.path) for i, before in enumerate(self.undo.files) if i not in self.merged]

    @property
    def copied(self) -> list[Path]:
        """In place all but the merged files stay where they are."""
        return [*self.unchanged, *self.others] if self.place.out else []

    @property
    def home(self) -> Path:
        """The folder whose disk takes the output."""
        return self.place.home

    @property
    def nbytes(self) -> int:
        restored = sum(self.undo.files[i].size for i in self.merged)
        return restored + sum(self._at(self.place.base, path).stat().st_size for path in self.copied)

    def report(self, seconds: float) -> UnmergeReport:
        out = self.place.out or self.place.base
        restored = tuple(self._at(out, Path(self.undo.files[i].path)) for i in self.merged)
        unchanged = tuple(self._at(out, path) for path in self.unchanged)
        others = tuple(out / path for path in self.others)
        return UnmergeReport(out, restored, unchanged, others, self.nbytes, seconds)

    def _at(self, root: Path, path: Path) -> Path:
        return root / path if self.place.folder else root


def _check_kind(merged: Path, undo: Undo) -> None:
    if not merged.exists():
        raise NotFoundError(f"{str(merged)!r} does not exist.", fix="Check the path.")
    if merged.is_dir() != undo.folder:
        was = "folder" if undo.folder else "file"
        raise ConflictError(f"the undo file is of a merged {was}, {str(merged)!r} is none.", fix=f"Give the {was}.")


def _path(place: MergeDestination, before: Before) -> Path:
    return place.base / before.path if place.folder else place.base


def _is_merged(undo: Undo, number: int, path: Path, threads: int) -> bool:
    """True for the file as the merge wrote it, False for the base's own. Raises IntegrityError for any other."""
    before = undo.files[number]
    if not path.is_file():
        raise _foreign(f"{str(path)!r} is missing.")
    if _starts_with(path, undo.opening(number)) and file_sha256(path) == before.sha256:
        return False
    if not before.is_index:
        _check_tensors(before, path, threads)
    elif file_sha256(path) != before.merged[INDEX]:
        raise _foreign(f"{str(path)!r} is not what the merge wrote.")
    return True


def _starts_with(path: Path, opening: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(opening)) == opening


def _check_tensors(before: Before, path: Path, threads: int) -> None:
    """Raise IntegrityError unless each touched tensor has the bytes that the merge gave it."""
    header = read_header(path)
    missing = [name for name in before.merged if name not in header.tensors]
    if missing:
        raise _foreign(f"{str(path)!r} has no tensor {quoted(missing[0])}.")
    with open_source(path, header.file_size) as file:
        run_tasks((partial(_check_tensor, header, file, *item) for item in before.merged.items()), threads=threads)


def _check_tensor(header: Header, file: BinaryIO, name: str, sha256: str, report: ByteCounter) -> None:
    info, digest = header.tensors[name], hashlib.sha256()
    for done in range(0, info.nbytes, _PIECE):
        digest.update(read_at(file.fileno(), min(_PIECE, info.nbytes - done), header.data_start + info.start + done))
        report(0)
    if digest.hexdigest() != sha256:
        raise _foreign(f"{quoted(name)} of {str(header.path)!r} is not what the merge wrote.")


def _restore(undo: Undo, number: int, merged: Path, file: BinaryIO, threads: int, progress: ByteCounter | None) -> None:
    """Write the base's file: its own header, its touched tensors from the undo file, the rest from the merged one."""
    before, opening = undo.files[number], undo.opening(number)
    with (
        open_source(merged, merged.stat().st_size) as rest,
        open_source(undo.header.path, undo.header.file_size) as old,
    ):
        touched, untouched = ([], []) if before.is_index else _ranges(undo, number, opening, read_header(merged))
        parts = [*copied(old, file, touched), *copied(rest, file, untouched)]
        fill(file, opening, before.size, parts, threads=threads, progress=progress)
    file.seek(0)
    if rest_sha256(file) != before.sha256:
        raise _foreign(f"{str(merged)!r} was changed after the merge, in tensors that the merge did not touch.")


def _ranges(undo: Undo, number: int, opening: bytes, merged: Header) -> tuple[list[Range], list[Range]]:
    """The bytes that come from the undo file, and those that come from the merged one."""
    touched, untouched = [], []
    for name, info in parsed(opening).items():
        target = len(opening) + info.start
        if name in undo.files[number].merged:
            touched.append(Range(undo.place(number, name), target, info.nbytes))
        elif name in merged.tensors and merged.tensors[name].nbytes == info.nbytes:
            untouched.append(Range(merged.data_start + merged.tensors[name].start, target, info.nbytes))
        else:
            raise _foreign(f"{str(merged.path)!r} has no tensor {quoted(name)} of {info.nbytes:,} bytes.")
    return sorted(touched, key=_by_target), sorted(untouched, key=_by_target)


def _by_target(piece: Range) -> int:
    return piece.target


def _foreign(cause: str) -> IntegrityError:
    return IntegrityError(cause, fix="Give what that merge wrote, unchanged, and the undo file of the same merge.")
