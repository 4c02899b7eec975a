"""SHA-256 digests of files, computed only on request: large files take seconds. Torch-free."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO


def file_sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file in hexadecimal."""
    with path.open("rb") as file:
        return rest_sha256(file)


def rest_sha256(file: BinaryIO) -> str:
    """Return the SHA-256 digest of an open file from its current position to the end."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def file_sha256_once(path: Path) -> str:
    """Like file_sha256, but cached until the file changes: a push needs the same digest several times."""
    status = path.stat()
    return _cached_sha256(path, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=64)
def _cached_sha256(path: Path, size: int, modified: int, inode: int) -> str:
    return file_sha256(path)
