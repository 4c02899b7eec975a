"""Where a merge reads and writes, the checks of both, and atomic outputs. Torch-free."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from krona_hub.checkpoints.atomic import atomic_file, atomic_folder, check_folder, check_output
from krona_hub.errors import ConflictError, NotFoundError, ResourceError, UsageError

_ELSEWHERE = "Choose another output with -o."


@dataclass(frozen=True)
class MergeDestination:
    """Where a merge reads and writes."""

    base: Path  # a file or a folder
    out: Path | None  # of the same kind; None: in place, which requires `undo`
    undo: Path | None = None  # undo file for `unmerge`
    overwrite: bool = False  # replace existing files at `out` and `undo`
    link: bool = False  # hard-link untouched files of a folder instead of copying them

    @property
    def folder(self) -> bool:
        return self.base.is_dir()

    @property
    def home(self) -> Path:
        """A folder on the disk of the output."""
        if self.out is not None:
            return self.out.parent
        return self.base if self.folder else self.base.parent

    @property
    def undo_overwrite(self) -> bool:
        """Whether an undo file may be replaced: never in place, since the old one may be the only way to restore."""
        return self.overwrite and self.out is not None

    def relative(self, path: Path) -> Path:
        """Return the path of a base file in the output folder; the name of a single file."""
        return path.relative_to(self.base) if self.folder else Path(path.name)


def check_destination(destination: MergeDestination, touched: Sequence[Path] = ()) -> None:
    """Raise before any work what writing there would raise. `touched` are the paths of the files that will change.

    UsageError (in place without undo), ConflictError (output exists, is or is inside the base, or is of the other
    kind; invalid path of the undo file), NotFoundError (no parent folder), ResourceError (not writable).
    """
    if not destination.base.exists():
        raise NotFoundError(f"{str(destination.base)!r} does not exist.", fix="Check the path.")
    if destination.out is None:
        _check_in_place(destination, touched)
    else:
        check_new(destination, destination.out)
    if destination.undo is not None:
        _check_undo(destination, destination.undo)


def _check_in_place(destination: MergeDestination, touched: Sequence[Path]) -> None:
    if destination.undo is None:
        raise UsageError(
            "Merging in place requires an undo file.", fix="Add --undo FILE, or write to a new path with -o."
        )
    if destination.link:
        raise UsageError("--link does not apply to an in-place merge.", fix="Omit --link.")
    check_changeable(touched)


def check_changeable(files: Sequence[Path]) -> None:
    """Raise if one of the files cannot be replaced in place."""
    for path in files:
        if path.is_symlink():
            raise ConflictError(
                f"{str(path)!r} is a link to {str(path.resolve())!r}, which may be shared.",
                fix="Write to a new path with -o, or specify the file itself.",
            )
        _check_writable(path.parent)


def check_new(destination: MergeDestination, out: Path) -> None:
    """Raise what writing to `out`, separate from the base, would raise."""
    check_apart(destination.base, out)
    if destination.folder:
        check_folder(out, overwrite=destination.overwrite)
        _check_no_links(out)
    else:
        check_output(out, overwrite=destination.overwrite)
    _check_writable(out.parent)
    if destination.folder and out.is_dir():
        _check_writable(out)


def check_apart(source: Path, out: Path) -> None:
    """Raise ConflictError if writing `out` could change `source`: the same, also by a link, or one inside the other."""
    inside, outside = out.resolve(), source.resolve()
    if inside == outside or (out.exists() and out.samefile(source)):
        raise ConflictError(f"The output {str(out)!r} is the input itself.", fix=_ELSEWHERE)
    if inside.is_relative_to(outside):
        raise ConflictError(f"The output {str(out)!r} is inside the input.", fix=_ELSEWHERE)
    if outside.is_relative_to(inside):
        raise ConflictError(f"The input {str(source)!r} is inside the output.", fix=_ELSEWHERE)


def _check_no_links(folder: Path) -> None:
    """Raise for linked folders: files are replaced by name, and a linked folder may lead to the base."""
    for parent, names, _ in os.walk(folder):
        for name in names:
            if (Path(parent) / name).is_symlink():
                raise ConflictError(
                    f"{str(Path(parent) / name)!r} is a link to a folder; the output would be written through it.",
                    fix=_ELSEWHERE,
                )


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ResourceError(
            f"The folder {str(folder)!r} is not writable.", fix="Choose another output, or change the permissions."
        )


def _check_undo(destination: MergeDestination, undo: Path) -> None:
    if destination.out is None and undo.is_file():
        raise ConflictError(
            f"{str(undo)!r} already exists; the in-place merge that it undoes may be incomplete.",
            fix="Run `krona unmerge` with it and then delete it, or choose another name.",
        )
    check_output(undo, overwrite=destination.overwrite)
    for folder in (destination.base, destination.out):
        if folder is not None and undo.resolve().is_relative_to(folder.resolve()):
            raise ConflictError(
                f"The undo file {str(undo)!r} conflicts with the merge: it must not be or be inside {str(folder)!r}.",
                fix="Choose a path outside the base and the output.",
            )
    _check_writable(undo.parent)


class Output(NamedTuple):
    """An output that is being written."""

    create: Callable[[Path], AbstractContextManager[BinaryIO]]
    """Opens a file by relative path, for reading and writing."""
    folder: Path | None = None  # temporary location, for a new folder


@contextmanager
def opened(destination: MergeDestination) -> Iterator[Output]:
    """Open an output whose files appear if the block succeeds and are deleted otherwise.

    A single file, and each file in place, is renamed individually; a new folder is renamed as a whole.
    """
    with ExitStack() as stack:
        if destination.out is None:
            yield Output(lambda path: nullcontext(_beside(destination, path, stack)))
        elif destination.folder:
            folder = stack.enter_context(atomic_folder(destination.out, overwrite=destination.overwrite))
            yield Output(lambda path: _created(folder / path), folder)
        else:
            file = stack.enter_context(atomic_file(destination.out, overwrite=destination.overwrite))
            yield Output(lambda _: nullcontext(file))


def _beside(destination: MergeDestination, relative: Path, stack: ExitStack) -> BinaryIO:
    """Open a file that will replace one of the base, with its permissions."""
    path = destination.base / relative if destination.folder else destination.base
    file = stack.enter_context(atomic_file(path, overwrite=True))
    if hasattr(os, "fchmod"):
        os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
    return file


def _created(path: Path) -> AbstractContextManager[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("x+b")
