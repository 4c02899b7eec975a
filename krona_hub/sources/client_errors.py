"""Conversion of Hub client exceptions to KronaErrors."""

from __future__ import annotations

import builtins
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from krona_hub.errors import (
    AuthError,
    ConflictError,
    IntegrityError,
    KronaError,
    NotFoundError,
    OfflineError,
    RateLimitError,
    ResourceError,
    UsageError,
)

LOGIN = "Run `hf auth login`, or set HF_TOKEN."
THE_HUB = "the Hub"  # for requests that do not concern a repository
_AGAIN = "Try again: completed uploads are not sent again; a download starts over."


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Convert client errors inside the block to KronaErrors about `what`, a repository or a part of it."""
    try:
        yield
    except KronaError:
        raise
    except Exception as error:
        converted = as_ours(error, what)
        if converted is None:
            raise
        raise converted from error


def as_ours(error: BaseException, what: str) -> KronaError | None:
    """Convert a client exception to a KronaError; None for exceptions that the client does not raise."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    if isinstance(error, KronaError):
        return error
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading …" hides the cause
        return as_ours(error.__cause__, what)
    if isinstance(error, errors.HfHubHTTPError):
        return _from_response(error, what)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return AuthError(f"{what}: no Hub token found on this machine.", fix=LOGIN)
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{what!r} is not a valid repository name.", fix="Use the form namespace/name.")
    if isinstance(error, errors.FileMetadataError):
        return IntegrityError(f"{what}: {_first_line(error)}", fix="Check HF_ENDPOINT and the proxy.")
    if is_xet(error):
        return _from_xet(error, what)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return OfflineError(f"{_about(what)}HF_HUB_OFFLINE is set.", fix="Unset HF_HUB_OFFLINE to use the Hub.")
    offline = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError)
    if isinstance(error, offline):  # "cannot find the file on the Hub, nor in the cache" hides the cause, too
        return (as_ours(error.__cause__, what) if error.__cause__ else None) or unreachable(what)
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol)):
        return unreachable(what)
    if isinstance(error, (httpx.HTTPError, httpx.StreamError, builtins.ConnectionError, TimeoutError)):
        return OfflineError(f"{_about(what)}the connection was interrupted.", fix=_AGAIN)
    if isinstance(error, OSError):
        return _from_os_error(error, what)
    return _from_value_error(error, what) if isinstance(error, ValueError) else None


def unreachable(what: str) -> OfflineError:
    """Return the error for a Hub that cannot be reached."""
    fix = "Check the connection, and HF_ENDPOINT if it is set."
    return OfflineError(f"{_about(what)}the Hub cannot be reached.", fix=fix)


def _about(what: str) -> str:
    return "" if what == THE_HUB else f"{what}: "


def is_xet(error: BaseException) -> bool:
    """Return whether the Xet part of the client failed: it raises a plain ConnectionError with a message."""
    return isinstance(error, builtins.ConnectionError) and "xet-" in str(error)


def has_no_xet(error: BaseException) -> bool:
    """Return whether the server does not support Xet, so that LFS should be tried."""
    return is_xet(error) and "404" in str(error)


def _from_xet(error: BaseException, what: str) -> KronaError:
    if "403" in str(error) or "401" in str(error):
        return AuthError(f"{what}: the token has no write access.", fix=f"Use a token with write access. {LOGIN}")
    return OfflineError(f"{what}: the transfer was interrupted.", fix=_AGAIN)


def _from_response(error: Any, what: str) -> KronaError:
    """Convert an error response of the Hub."""
    from huggingface_hub import errors

    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        fix = f"Accept its terms on its page, with the account of your token. {LOGIN}"
        return AuthError(f"{_repo(what)} is gated: you must accept its terms first.", fix=fix)
    if isinstance(error, errors.DisabledRepoError):
        return AuthError(f"{_repo(what)} was disabled by the Hub.", fix="Contact its owner or the Hub.")
    if isinstance(error, errors.RevisionNotFoundError):
        return NotFoundError(f"{what} has no such branch, tag or commit.", fix="Check the revision after the @.")
    if isinstance(error, errors.EntryNotFoundError):
        return NotFoundError(
            f"{what} has no such file.", fix="Check the file name; list the files with krona hub info."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return _missing(status, what)
    return _from_status(status, error, what)


def _repo(what: str) -> str:
    """Return the repository of a file or a revision.

    >>> _repo("ana/style/x.safetensors"), _repo("ana/style@v1")
    ('ana/style', 'ana/style')
    """
    return "/".join(what.split("@")[0].split("/")[:2])


def _missing(status: int, what: str) -> KronaError:
    if status == 401:
        cause = f"{what} does not exist, or it is private and you are not logged in."
        return AuthError(cause, fix=f"Check the name. {LOGIN}")
    return NotFoundError(
        f"{what} does not exist on the Hub, or it is private and the token has no access.",
        fix="Check the name, and the account with `hf auth whoami`.",
    )


def _from_status(status: int, error: Any, what: str) -> KronaError:
    if status == 401:
        return AuthError(f"{what}: the Hub does not accept the token.", fix=LOGIN)
    if status == 403 and _only_reads(error.response.request):
        return AuthError(f"{what}: the token has no read access.", fix=f"Ask the owner for access. {LOGIN}")
    if status == 403:
        return AuthError(
            f"{what}: the token does not permit this operation.", fix=f"Use a token with write access. {LOGIN}"
        )
    if status == 404:
        return NotFoundError(f"{what}: the Hub lists it but cannot find it.", fix="Try again later, or ask the owner.")
    if status == 422:
        return IntegrityError(f"{what}: the Hub received other data than was sent.", fix="Try again.")
    if status in (409, 412):
        return ConflictError(f"{what} was changed in the meantime.", fix="Review the change, and push again.")
    if status == 429:
        return RateLimitError(f"{what}: too many requests.", fix=f"Wait {_wait(error)} and try again.")
    if status == 413:
        return ResourceError(f"{what}: the file is too large for the Hub.", fix="Reduce the file size.")
    if status >= 500:
        return OfflineError(
            f"{what}: the Hub returned error {status}.", fix="Try again later: this is a problem of the server."
        )
    reason = getattr(error, "server_message", None) or "no reason given"
    return UsageError(f"{what}: the Hub rejected the request ({status}): {reason}", fix="Check the request.")


def _only_reads(request: Any) -> bool:
    requests_write = request.url.path.endswith("/auth-check/write") or "/xet-write-token/" in request.url.path
    return request.method in ("GET", "HEAD") and not requests_write


def wait_of(error: Any) -> float | None:
    """Return the seconds to wait that a response specifies, if any."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    headers = error.response.headers
    info = parse_ratelimit_headers(headers)
    if info is not None:
        return float(info.reset_in_seconds)
    after = headers.get("Retry-After", "")
    return float(after) if after.isdigit() else None


def _from_value_error(error: ValueError, what: str) -> KronaError:
    """Convert a ValueError: the Hub rejected the front matter of a card, or the server is not the Hub."""
    lines = [line.strip("- ") for line in str(error).splitlines() if line.strip()]
    if lines and "README.md" in lines[0]:
        return UsageError(
            f"{what}: the Hub rejected the model card: {' '.join(lines[1:])}", fix="Correct its front matter."
        )
    return IntegrityError(f"{what}: the server sent an invalid response.", fix="Check HF_ENDPOINT and the proxy.")


def _wait(error: Any) -> str:
    seconds = wait_of(error)
    return "a while" if seconds is None else f"{seconds:.0f} seconds"


def _from_os_error(error: OSError, what: str) -> KronaError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{what}: the disk is full.", fix="Free up disk space; no partial file is left.")
    if error.errno is None and "onsistency" in str(error):
        return IntegrityError(f"{what}: the download has a different size than the Hub reports.", fix="Try again.")
    return ResourceError(f"{what}: {error.strerror or _first_line(error)}.", fix="Check the disk and your permissions.")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
