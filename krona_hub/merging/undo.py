"""`unmerge`: restore the files of the base, byte for byte. Torch-free."""

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
    """Restored files, each verified by its sha256."""

    out: Path
    restored: tuple[Path, ...]  # formerly merged files
    unchanged: tuple[Path, ...]  # files already equal to the base (after an interrupted in-place merge)
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
    """Restore the base from a merged file or folder and the undo file of that merge, byte for byte.

    Parameters
    ----------
    merged, undo : output of `merge`, unchanged, and the undo file that it wrote.
    out, in_place, overwrite : output path, or restore in place; replace existing files.
    threads, progress : writer threads; called with the bytes written since the last call.

    Returns
    -------
    UnmergeReport : the restored files, each verified by its sha256.

    Raises
    ------
    IntegrityError, FormatError : `merged` was changed, or belongs to another merge; invalid undo file.
    UsageError : neither or both of `out` and `in_place`.

    Examples
    --------
    >>> import tempfile
    >>> from importlib.resources import files
    >>> from krona_hub import merge
    >>> lora = files("krona_hub.assets") / "zorbi_lora_kohya.safetensors"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     merged, undo = f"{folder}/merged", f"{folder}/undo.safetensors"
    ...     report = merge("tiny-scenes", [(lora, 0.8)], merged, undo=undo)
    ...     len(unmerge(merged, undo, f"{folder}/base").restored)
    2
    """
    started = perf_counter()
    work = _Work.of(Path(merged), Path(undo), _target(out, in_place), overwrite, threads)
    check_space(work.home, work.nbytes)
    with opened(work.destination) as output:
        for number in work.merged:
            before = work.undo.files[number]
            with output.create(Path(before.path)) as file:
                _restore(work.undo, number, _path(work.destination, before), file, threads, progress)
        copy_files(work.destination.base, work.copied, output, threads=threads, progress=progress)
    return work.report(perf_counter() - started)


def _target(out: str | Path | None, in_place: bool) -> Path | None:
    if (out is None) != in_place:
        cause = "Missing option --output." if out is None else "--output and --in-place exclude each other."
        raise UsageError(cause, fix="Specify -o OUT, or --in-place.")
    return None if out is None else Path(out)


@dataclass(frozen=True)
class _Work:
    """The files to restore, and those to copy."""

    destination: MergeDestination  # its base is the merged model
    undo: Undo
    merged: tuple[int, ...]  # indices of files that are still merged
    others: tuple[Path, ...]  # relative: files of the folder that the merge did not change

    @classmethod
    def of(cls, merged: Path, undo: Path, out: Path | None, overwrite: bool, threads: int) -> _Work:
        """Check everything that can be checked in advance. Raises as `unmerge` does."""
        record, destination = read_undo(undo), MergeDestination(merged, out, overwrite=overwrite)
        _check_kind(merged, record)
        files = [_path(destination, before) for before in record.files]
        if out is None:
            check_changeable(files)
        else:
            check_new(destination, out)
            check_apart(undo, out)
        states = [_is_merged(record, i, path, threads) for i, path in enumerate(files)]
        known = {Path(before.path) for before in record.files}
        others = [path for path in files_below(merged) if path not in known] if out and destination.folder else []
        return cls(destination, record, tuple(i for i, state in enumerate(states) if state), tuple(others))

    @property
    def unchanged(self) -> list[Path]:
        return [Path(before.path) for i, before in enumerate(self.undo.files) if i not in self.merged]

    @property
    def copied(self) -> list[Path]:
        """Files to copy; none in place."""
        return [*self.unchanged, *self.others] if self.destination.out else []

    @property
    def home(self) -> Path:
        """A folder on the disk of the output."""
        return self.destination.home

    @property
    def nbytes(self) -> int:
        restored = sum(self.undo.files[i].size for i in self.merged)
        return restored + sum(self._at(self.destination.base, path).stat().st_size for path in self.copied)

    def report(self, seconds: float) -> UnmergeReport:
        out = self.destination.out or self.destination.base
        restored = tuple(self._at(out, Path(self.undo.files[i].path)) for i in self.merged)
        unchanged = tuple(self._at(out, path) for path in self.unchanged)
        others = tuple(out / path for path in self.others)
        return UnmergeReport(out, restored, unchanged, others, self.nbytes, seconds)

    def _at(self, root: Path, path: Path) -> Path:
        return root / path if self.destination.folder else root


def _check_kind(merged: Path, undo: Undo) -> None:
    if not merged.exists():
        raise NotFoundError(f"{str(merged)!r} does not exist.", fix="Check the path.")
    if merged.is_dir() != undo.folder:
        was = "folder" if undo.folder else "file"
        raise ConflictError(
            f"The undo file belongs to a merged {was}; {str(merged)!r} is not a {was}.",
            fix=f"Specify the merged {was}.",
        )


def _path(destination: MergeDestination, before: Before) -> Path:
    return destination.base / before.path if destination.folder else destination.base


def _is_merged(undo: Undo, number: int, path: Path, threads: int) -> bool:
    """Return True for the merged file, False for the original. Raises IntegrityError for any other."""
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
    """Raise IntegrityError unless each touched tensor has the bytes that the merge wrote."""
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
    """Write the original file: header and touched tensors from the undo file, the rest from the merged one."""
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
    """Return the ranges from the undo file, and those from the merged file."""
    touched, untouched = [], []
    for name, info in parsed(opening).items():
        target = len(opening) + info.start
        if name in undo.files[number].merged:
            touched.append(Range(undo.offset(number, name), target, info.nbytes))
        elif name in merged.tensors and merged.tensors[name].nbytes == info.nbytes:
            untouched.append(Range(merged.data_start + merged.tensors[name].start, target, info.nbytes))
        else:
            raise _foreign(f"{str(merged.path)!r} has no tensor {quoted(name)} of {info.nbytes:,} bytes.")
    return sorted(touched, key=_by_target), sorted(untouched, key=_by_target)


def _by_target(piece: Range) -> int:
    return piece.target


def _foreign(cause: str) -> IntegrityError:
    return IntegrityError(cause, fix="Specify the unchanged output of the merge and the undo file of the same merge.")
