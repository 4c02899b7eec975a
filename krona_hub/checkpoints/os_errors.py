"""What the operating system refused, as errors with a fix. Torch-free."""

from __future__ import annotations

import errno
from pathlib import Path

from krona_hub.errors import ConflictError, KronaError, NotFoundError, ResourceError

_MISSING = "Check the spelling of the path."
_RIGHTS = "Choose another place, or change the permissions."
_SPACE = "Free some space, or write to another disk with -o."
_FAULTS: dict[int | None, tuple[type[KronaError], str, str]] = {
    errno.ENOENT: (NotFoundError, "does not exist.", _MISSING),
    errno.ENOTDIR: (NotFoundError, "lies below something that is no folder.", _MISSING),
    errno.ELOOP: (NotFoundError, "is a chain of links that never ends.", _MISSING),
    errno.ENAMETOOLONG: (NotFoundError, "is too long for a path.", "Use a shorter name."),
    errno.EACCES: (ResourceError, "may not be accessed: permission denied.", _RIGHTS),
    errno.EPERM: (ResourceError, "may not be accessed: not permitted.", _RIGHTS),
    errno.EROFS: (ResourceError, "is on a read-only file system.", "Choose another place with -o."),
    errno.ENOSPC: (ResourceError, "could not be written: the disk is full.", _SPACE),
    errno.EDQUOT: (ResourceError, "could not be written: the disk quota is used up.", _SPACE),
    errno.EFBIG: (ResourceError, "would be larger than the file system or a limit allows.", _SPACE),
    errno.EISDIR: (ConflictError, "is a folder.", "Name a file."),
    errno.EEXIST: (ConflictError, "exists already.", "Add --overwrite, or choose another output with -o."),
    errno.ENOTEMPTY: (ConflictError, "is a folder that is not empty.", "Choose another output with -o."),
}


def fault(error: OSError | ValueError, path: Path | str) -> KronaError:
    """The KronaError for what the system said about `path`.

    >>> fault(OSError(errno.ENOSPC, ""), "x.safetensors").code
    'KH200'
    """
    kind, cause, fix = _FAULTS.get(
        _number(error), (ResourceError, f"could not be accessed: {error}.", "Check the disk.")
    )
    return kind(f"{str(path)!r} {cause}", fix=fix)


def _number(error: OSError | ValueError) -> int | None:
    """What the system calls it; libraries that are not written in C raise the right class without a number."""
    if isinstance(error, ValueError):  # a NUL in the path
        return errno.ENOENT
    by_class = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, IsADirectoryError: errno.EISDIR}
    return error.errno if error.errno is not None else by_class.get(type(error))
