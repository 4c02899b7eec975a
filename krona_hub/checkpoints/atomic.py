"""Atomic output: files and folders appear complete, by rename, or not at all. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from krona_hub.checkpoints.os_errors import fault
from krona_hub.checkpoints.temporary_files import lock, remove, remove_leftovers, temporary_name
from krona_hub.errors import ConflictError, KronaError, NotFoundError

_OVERWRITE = "Add --overwrite, or choose another output with -o."


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """Raise the errors that writing a file to `path` would raise, before any work is done."""
    _check_parent(path)
    if path.is_dir():
        raise ConflictError(f"{str(path)!r} is a folder.", fix="Specify a file name inside it.")
    if os.path.lexists(path) and not path.is_file() and not path.is_symlink():
        raise ConflictError(f"{str(path)!r} is not a regular file.", fix="Choose another output with -o.")
    if os.path.lexists(path) and not overwrite:
        raise ConflictError(f"{str(path)!r} already exists.", fix=_OVERWRITE)


def check_folder(path: Path, *, overwrite: bool = False) -> None:
    """Raise the errors that writing a folder to `path` would raise, before any work is done."""
    _check_parent(path)
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise ConflictError(f"{str(path)!r} is a file, but the output is a folder.", fix="Choose another name with -o.")
    if any(path.iterdir()) and not overwrite:
        raise ConflictError(f"{str(path)!r} already exists and is not empty.", fix=_OVERWRITE)


@contextmanager
def atomic_file(path: Path | str, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` if the block succeeds and is removed otherwise.

    A symbolic link at `path` is replaced, not followed. Raises ConflictError if the output already exists,
    NotFoundError if the parent folder does not exist, ResourceError if the disk is full or not writable.
    """
    path = Path(path)
    try:
        check_output(path, overwrite=overwrite)
        with _temporary(path) as temporary, _create(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            check_output(path, overwrite=overwrite)
            temporary.replace(path)
        _sync_folder(path.parent)
    except KronaError:  # NotFoundError is an OSError too
        raise
    except OSError as error:
        raise fault(error, path) from error


def atomic_text(path: Path | str, text: str, *, overwrite: bool = False) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def atomic_folder(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Create a temporary folder that becomes `path` if the block succeeds and is removed otherwise.

    An empty folder at `path` is not a conflict. With `overwrite`, the files of an existing folder are replaced one
    by one, each by rename, and all other files stay: an existing folder is never deleted.
    """
    path = Path(path)
    try:
        check_folder(path, overwrite=overwrite)
        with _temporary(path) as temporary, _folder(temporary):
            yield temporary
            for file in _files(temporary):
                _sync_file(file)
            check_folder(path, overwrite=overwrite)
            _move(temporary, path)
        _sync_folder(path.parent)
    except KronaError:  # NotFoundError is an OSError too
        raise
    except OSError as error:
        raise fault(error, path) from error


def _check_parent(path: Path) -> None:
    parent = path.parent
    if "\0" in str(path):
        raise NotFoundError("a path cannot contain a NUL character.", fix="Check the spelling of the path.")
    if not parent.exists():
        raise NotFoundError(f"the folder {str(parent)!r} does not exist.", fix=f"Create it: mkdir -p {str(parent)!r}")
    if not parent.is_dir():
        raise ConflictError(f"{str(parent)!r} is a file, not a folder.", fix="Choose another output with -o.")


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` and remove that file or folder when the block ends, even on Ctrl-C.

    Leftovers of earlier processes that were killed are removed first.
    """
    remove_leftovers(path)
    temporary = temporary_name(path)
    try:
        yield temporary
    except KronaError as error:
        error.cause = error.cause.replace(str(temporary), str(path))  # users only know the final name
        raise
    finally:
        remove(temporary)


def _create(path: Path) -> BinaryIO:
    """Create and lock a new file with the permissions of a plain open(), unlike mkstemp."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    file = os.fdopen(os.open(path, flags, 0o666), "w+b")
    lock(path, file.fileno())
    return file


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Create a new folder that stays locked while the block runs."""
    path.mkdir()
    if not hasattr(os, "O_DIRECTORY"):  # on systems where folders cannot be opened
        yield
        return
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock(path, folder)
        yield
    finally:
        os.close(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _move(temporary: Path, path: Path) -> None:
    """Rename the folder as a whole if `path` is missing or empty, otherwise rename file by file."""
    if not path.exists():
        temporary.rename(path)
        return
    for file in _files(temporary):
        target = path / file.relative_to(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make the rename itself durable, if the system supports it."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
