"""Cleanup of temporary files left by killed processes; a lock marks those still in use. Torch-free."""

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
    """Return a new name in the folder of `path`, hence on the same disk."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")


def is_temporary(name: str) -> bool:
    """Return whether a file name is that of a temporary file, in use or left over.

    >>> is_temporary(".x.safetensors.0123abcd.part"), is_temporary("x.part")
    (True, False)
    """
    return _TEMPORARY.fullmatch(name) is not None


def lock(path: Path, file: int) -> None:
    """Lock the open file or folder at `path`; the system releases the lock when the process ends.

    Raises ConflictError if another process removed it as a leftover before it was locked.
    """
    try:
        _flock(file)
    except BlockingIOError:
        raise _in_use() from None
    except OSError:  # a file system without locks: leftovers are kept
        return
    if not path.exists():
        raise _in_use()


def remove_leftovers(path: Path) -> None:
    """Remove the leftovers of killed processes that wrote `path`; they can be as large as the output."""
    if sys.platform != "win32":  # Windows has no such lock
        for other in path.parent.iterdir():
            if is_temporary(other.name) and other.name[:-_SUFFIX] == f".{path.name[:100]}":
                _remove_if_dead(other)


def _remove_if_dead(path: Path) -> None:
    with suppress(OSError):  # locked, or already removed
        file = os.open(path, os.O_RDONLY)
        try:
            _flock(file)
            remove(path)
        finally:
            os.close(file)


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _flock(file: int) -> None:
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _in_use() -> ConflictError:
    return ConflictError("another process is writing to the same location.", fix="Try again when it has finished.")
