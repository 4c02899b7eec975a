"""Temporary files of writers that were killed: told from those of living ones by a lock, and removed. Torch-free."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from krona_hub.errors import ConflictError

if sys.platform != "win32":
    import fcntl

_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{8}\.part", re.DOTALL)
_SUFFIX = len(".01234567.part")


def temporary_name(path: Path) -> Path:
    """A new name beside `path`, so on the same disk."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")


def is_temporary(name: str) -> bool:
    """Whether a file is one that is being written, or a leftover.

    >>> is_temporary(".x.safetensors.0123abcd.part"), is_temporary("x.part")
    (True, False)
    """
    return _TEMPORARY.fullmatch(name) is not None


def lock(path: Path, file: int) -> None:
    """Mark the open file or folder at `path` as somebody's: the system drops the lock when its holder dies.

    Raises ConflictError where another process took it for a leftover before it was locked.
    """
    try:
        _flock(file)
    except BlockingIOError:
        raise _taken() from None
    except OSError:  # a file system without locks: leftovers stay there
        return
    if not path.exists():
        raise _taken()


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of their tries to write `path`; it may be as large as the whole output."""
    if sys.platform != "win32":  # which has no such lock
        for other in path.parent.iterdir():
            if is_temporary(other.name) and other.name[:-_SUFFIX] == f".{path.name[:100]}":
                _remove_if_dead(other)


def _remove_if_dead(path: Path) -> None:
    with suppress(OSError):  # locked, or gone already
        file = os.open(path, os.O_RDONLY)
        try:
            _flock(file)
            remove(path)
        finally:
            os.close(file)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _flock(file: int) -> None:
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _taken() -> ConflictError:
    return ConflictError("another process writes to the same place.", fix="Try again when it is done.")
