"""Conversion of operating system errors to KronaErrors with a fix. Torch-free."""

from __future__ import annotations

import errno
from pathlib import Path

from krona_hub.errors import ConflictError, KronaError, NotFoundError, ResourceError

_MISSING = "Check the spelling of the path."
_RIGHTS = "Choose another location, or change the permissions."
_SPACE = "Free up disk space, or write to another disk with -o."
_FAULTS: dict[int | None, tuple[type[KronaError], str, str]] = {
    errno.ENOENT: (NotFoundError, "does not exist.", _MISSING),
    errno.ENOTDIR: (NotFoundError, "has a parent that is not a folder.", _MISSING),
    errno.ELOOP: (NotFoundError, "is a loop of symbolic links.", _MISSING),
    errno.ENAMETOOLONG: (NotFoundError, "is too long for a path.", "Use a shorter name."),
    errno.EACCES: (ResourceError, "cannot be accessed: permission denied.", _RIGHTS),
    errno.EPERM: (ResourceError, "cannot be accessed: operation not permitted.", _RIGHTS),
    errno.EROFS: (ResourceError, "is on a read-only file system.", "Choose another location with -o."),
    errno.ENOSPC: (ResourceError, "could not be written: the disk is full.", _SPACE),
    errno.EDQUOT: (ResourceError, "could not be written: the disk quota is exceeded.", _SPACE),
    errno.EFBIG: (ResourceError, "exceeds the maximum file size.", _SPACE),
    errno.EISDIR: (ConflictError, "is a folder.", "Specify a file."),
    errno.EEXIST: (ConflictError, "already exists.", "Add --overwrite, or choose another output with -o."),
    errno.ENOTEMPTY: (ConflictError, "is a folder that is not empty.", "Choose another output with -o."),
}


def fault(error: OSError | ValueError, path: Path | str) -> KronaError:
    """Convert an operating system error about `path` to a KronaError.

    >>> fault(OSError(errno.ENOSPC, ""), "x.safetensors").code
    'KH200'
    """
    kind, cause, fix = _FAULTS.get(
        _number(error), (ResourceError, f"could not be accessed: {error}.", "Check the disk.")
    )
    return kind(f"{str(path)!r} {cause}", fix=fix)


def _number(error: OSError | ValueError) -> int | None:
    """Return the errno, derived from the class if it is missing: some libraries raise the class without a number."""
    if isinstance(error, ValueError):  # a NUL in the path
        return errno.ENOENT
    by_class = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, IsADirectoryError: errno.EISDIR}
    return error.errno if error.errno is not None else by_class.get(type(error))
