"""Where a merge reads and writes, what forbids that, and outputs that appear whole. Torch-free."""

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
    out: Path | None  # of the same kind; None: the base itself is changed, which needs `undo`
    undo: Path | None = None  # file that will hold what `unmerge` needs
    overwrite: bool = False  # replace what is at `out` and `undo`
    link: bool = False  # hard-link untouched files of a folder instead of copying them

    @property
    def folder(self) -> bool:
        return self.base.is_dir()

    @property
    def home(self) -> Path:
        """A folder on the disk that takes the output."""
        if self.out is not None:
            return self.out.parent
        return self.base if self.folder else self.base.parent

    @property
    def undo_overwrite(self) -> bool:
        """Whether an undo file may be replaced: not in place, where the old one may be the only way back."""
        return self.overwrite and self.out is not None

    def relative(self, path: Path) -> Path:
        """Where a file of the base lies in the output folder; of a lone file its name."""
        return path.relative_to(self.base) if self.folder else Path(path.name)


def check_place(place: MergeDestination, touched: Sequence[Path] = ()) -> None:
    """Raise what writing there would raise, before any work. `touched`: paths of the files that will change.

    UsageError (in place without undo), ConflictError (output exists, equals the base or lies in it, is of the other
    kind, an undo file in the way), NotFoundError (no parent folder), ResourceError (not writable).
    """
    if not place.base.exists():
        raise NotFoundError(f"{str(place.base)!r} does not exist.", fix="Check the path.")
    if place.out is None:
        _check_in_place(place, touched)
    else:
        check_new(place, place.out)
    if place.undo is not None:
        _check_undo(place, place.undo)


def _check_in_place(place: MergeDestination, touched: Sequence[Path]) -> None:
    if place.undo is None:
        raise UsageError(
            "a base is changed in place only with a way back.", fix="Add --undo FILE, or write elsewhere with -o."
        )
    if place.link:
        raise UsageError("there is nothing to link in place.", fix="Leave --link out.")
    check_changeable(touched)


def check_changeable(files: Sequence[Path]) -> None:
    """Raise where one of the files cannot be replaced where it lies."""
    for path in files:
        if path.is_symlink():
            raise ConflictError(
                f"{str(path)!r} is a link to {str(path.resolve())!r}, which others may use.",
                fix="Write elsewhere with -o, or name the file itself.",
            )
        _check_writable(path.parent)


def check_new(place: MergeDestination, out: Path) -> None:
    """Raise what writing to `out`, apart from the base, would raise."""
    check_apart(place.base, out)
    if place.folder:
        check_folder(out, overwrite=place.overwrite)
        _check_no_links(out)
    else:
        check_output(out, overwrite=place.overwrite)
    _check_writable(out.parent)
    if place.folder and out.is_dir():
        _check_writable(out)


def check_apart(source: Path, out: Path) -> None:
    """Raise ConflictError where writing `out` could change `source`: equal, by a link too, or one in the other."""
    inside, outside = out.resolve(), source.resolve()
    if inside == outside or (out.exists() and out.samefile(source)):
        raise ConflictError(f"the output {str(out)!r} is the input itself.", fix=_ELSEWHERE)
    if inside.is_relative_to(outside):
        raise ConflictError(f"the output {str(out)!r} lies in the input.", fix=_ELSEWHERE)
    if outside.is_relative_to(inside):
        raise ConflictError(f"the input {str(source)!r} lies in the output.", fix=_ELSEWHERE)


def _check_no_links(folder: Path) -> None:
    """Files are replaced by name, but a linked folder leads elsewhere, to the base perhaps."""
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
            f"the folder {str(folder)!r} is not writable.", fix="Choose another place, or change the permissions."
        )


def _check_undo(place: MergeDestination, undo: Path) -> None:
    if place.out is None and undo.is_file():
        raise ConflictError(
            f"{str(undo)!r} exists already; the merge in place that it undoes may be half done.",
            fix="Run `krona unmerge` with it first and then remove it, or choose another name.",
        )
    check_output(undo, overwrite=place.overwrite)
    for folder in (place.base, place.out):
        if folder is not None and undo.resolve().is_relative_to(folder.resolve()):
            raise ConflictError(
                f"the undo file {str(undo)!r} is in the way of the merge: it would be or lie in {str(folder)!r}.",
                fix="Put it beside, under another name.",
            )
    _check_writable(undo.parent)


class Output(NamedTuple):
    """An output while it is being written."""

    create: Callable[[Path], AbstractContextManager[BinaryIO]]
    """Opens the file of a relative path, for reading and writing."""
    folder: Path | None = None  # where its files lie for now, where it is a folder of its own


@contextmanager
def opened(place: MergeDestination) -> Iterator[Output]:
    """An output whose files appear when the block ends well and vanish when it does not.

    A file, and each file in place, appears by a rename of its own; a folder by one of the whole.
    """
    with ExitStack() as stack:
        if place.out is None:
            yield Output(lambda path: nullcontext(_beside(place, path, stack)))
        elif place.folder:
            folder = stack.enter_context(atomic_folder(place.out, overwrite=place.overwrite))
            yield Output(lambda path: _created(folder / path), folder)
        else:
            file = stack.enter_context(atomic_file(place.out, overwrite=place.overwrite))
            yield Output(lambda _: nullcontext(file))


def _beside(place: MergeDestination, relative: Path, stack: ExitStack) -> BinaryIO:
    """A file that will replace one of the base, with its rights."""
    path = place.base / relative if place.folder else place.base
    file = stack.enter_context(atomic_file(path, overwrite=True))
    if hasattr(os, "fchmod"):
        os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
    return file


def _created(path: Path) -> AbstractContextManager[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("x+b")
