"""The sha256 of a file, read in pieces. Done only where it is asked for: large files take seconds. Torch-free."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO


def file_sha256(path: Path) -> str:
    """The digest in hexadecimal."""
    with path.open("rb") as file:
        return rest_sha256(file)


def rest_sha256(file: BinaryIO) -> str:
    """The digest of what an open file holds from its position on."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def file_sha256_once(path: Path) -> str:
    """As file_sha256, read again only where the file has changed: a push asks for the same digest several times."""
    about = path.stat()
    return _remembered(path, about.st_size, about.st_mtime_ns, about.st_ino)


@lru_cache(maxsize=64)
def _remembered(path: Path, size: int, changed: int, inode: int) -> str:
    return file_sha256(path)
