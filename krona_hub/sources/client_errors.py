"""What the client of the Hub raises, as errors of ours: one place for all its ways to fail."""

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
THE_HUB = "the Hub"  # where no repository is meant
_AGAIN = "Try again: what the Hub has got is not sent again, a download starts over."


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Errors of the client inside the block as KronaErrors about `what`, a repository or a part of one."""
    try:
        yield
    except KronaError:
        raise
    except Exception as error:
        told = as_ours(error, what)
        if told is None:
            raise
        raise told from error


def as_ours(error: BaseException, what: str) -> KronaError | None:
    """The KronaError that an exception of the client stands for; None for what it never raises."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    if isinstance(error, KronaError):
        return error
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading …" hides the reason
        return as_ours(error.__cause__, what)
    if isinstance(error, errors.HfHubHTTPError):
        return _of_answer(error, what)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return AuthError(f"{what}: there is no token on this machine.", fix=LOGIN)
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{what!r} is no name of a repository.", fix="Write namespace/name.")
    if isinstance(error, errors.FileMetadataError):
        return IntegrityError(f"{what}: {_first_line(error)}", fix="Check HF_ENDPOINT and the proxy.")
    if is_xet(error):
        return _of_xet(error, what)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return OfflineError(f"{_about(what)}HF_HUB_OFFLINE is set, so the Hub is not asked.", fix="Unset it.")
    offline = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError)
    if isinstance(error, offline):  # "cannot find the file on the Hub, nor in the cache" hides the reason too
        return (as_ours(error.__cause__, what) if error.__cause__ else None) or unreachable(what)
    if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol)):
        return unreachable(what)
    if isinstance(error, (httpx.HTTPError, httpx.StreamError, builtins.ConnectionError, TimeoutError)):
        return OfflineError(f"{_about(what)}the connection broke off.", fix=_AGAIN)
    if isinstance(error, OSError):
        return _of_the_system(error, what)
    return _of_nonsense(error, what) if isinstance(error, ValueError) else None


def unreachable(what: str) -> OfflineError:
    """The Hub does not answer."""
    fix = "Check the connection, and HF_ENDPOINT where it is set."
    return OfflineError(f"{_about(what)}the Hub cannot be reached.", fix=fix)


def _about(what: str) -> str:
    return "" if what == THE_HUB else f"{what}: "


def is_xet(error: BaseException) -> bool:
    """Whether the Xet part of the client failed: it raises a plain ConnectionError with a text."""
    return isinstance(error, builtins.ConnectionError) and "xet-" in str(error)


def has_no_xet(error: BaseException) -> bool:
    """Whether the hub has no Xet at all, so that LFS is worth a try."""
    return is_xet(error) and "404" in str(error)


def _of_xet(error: BaseException, what: str) -> KronaError:
    if "403" in str(error) or "401" in str(error):
        return AuthError(f"{what}: the token may not write there.", fix=f"Use a token with write access. {LOGIN}")
    return OfflineError(f"{what}: the transfer broke off.", fix=_AGAIN)


def _of_answer(error: Any, what: str) -> KronaError:
    """An answer of the Hub that is an error."""
    from huggingface_hub import errors

    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        fix = f"Accept its terms on its page, with the account of your token. {LOGIN}"
        return AuthError(f"{_repo(what)} is gated: its owner wants consent.", fix=fix)
    if isinstance(error, errors.DisabledRepoError):
        return AuthError(f"{_repo(what)} was disabled by the Hub.", fix="Only its owner or the Hub can lift that.")
    if isinstance(error, errors.RevisionNotFoundError):
        return NotFoundError(f"{what} has no such branch, tag or commit.", fix="Check what follows the @.")
    if isinstance(error, errors.EntryNotFoundError):
        return NotFoundError(f"{what} has no such file.", fix="Check its name: krona hub info lists the files.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return _missing(status, what)
    return _of_status(status, error, what)


def _repo(what: str) -> str:
    """The repository that a file or a revision is of.

    >>> _repo("ana/style/x.safetensors"), _repo("ana/style@v1")
    ('ana/style', 'ana/style')
    """
    return "/".join(what.split("@")[0].split("/")[:2])


def _missing(status: int, what: str) -> KronaError:
    if status == 401:
        told = f"{what} does not exist, or is private, and nobody is logged in."
        return AuthError(told, fix=f"Check the name. {LOGIN}")
    return NotFoundError(
        f"{what} does not exist on the Hub, or is private and the token may not see it.",
        fix="Check the name, and the account: `hf auth whoami`.",
    )


def _of_status(status: int, error: Any, what: str) -> KronaError:
    if status == 401:
        return AuthError(f"{what}: the Hub does not accept the token.", fix=LOGIN)
    if status == 403 and _only_reads(error.response.request):
        return AuthError(f"{what}: the token may not read that.", fix=f"Ask its owner for access. {LOGIN}")
    if status == 403:
        return AuthError(f"{what}: the token may not do that.", fix=f"Use a token with write access. {LOGIN}")
    if status == 404:
        return NotFoundError(f"{what}: the Hub names it, and does not have it.", fix="Try later, or ask its owner.")
    if status == 422:
        return IntegrityError(f"{what}: what has arrived is not what was sent.", fix="Try again.")
    if status in (409, 412):
        return ConflictError(f"{what} was changed meanwhile.", fix="Look at it, and push again.")
    if status == 429:
        return RateLimitError(f"{what}: too many requests.", fix=f"Wait {_wait(error)} and try again.")
    if status == 413:
        return ResourceError(f"{what}: the Hub does not take files of that size.", fix="Make it smaller.")
    if status >= 500:
        return OfflineError(f"{what}: the Hub answers with error {status}.", fix="It is not your fault: try later.")
    told = getattr(error, "server_message", None) or "it does not say why"
    return UsageError(f"{what}: the Hub refuses the request ({status}): {told}", fix="Check what was asked for.")


def _only_reads(request: Any) -> bool:
    asks_to_write = request.url.path.endswith("/auth-check/write") or "/xet-write-token/" in request.url.path
    return request.method in ("GET", "HEAD") and not asks_to_write


def wait_of(error: Any) -> float | None:
    """Seconds that the Hub asks to wait, where it says so."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    headers = error.response.headers
    info = parse_ratelimit_headers(headers)
    if info is not None:
        return float(info.reset_in_seconds)
    after = headers.get("Retry-After", "")
    return float(after) if after.isdigit() else None


def _of_nonsense(error: ValueError, what: str) -> KronaError:
    """The Hub refuses the front matter of a card, or it is no Hub: the client raises ValueError for both."""
    lines = [line.strip("- ") for line in str(error).splitlines() if line.strip()]
    if lines and "README.md" in lines[0]:
        return UsageError(f"{what}: the Hub refuses the card: {' '.join(lines[1:])}", fix="Correct its front matter.")
    return IntegrityError(f"{what}: the server's answer makes no sense.", fix="Check HF_ENDPOINT and the proxy.")


def _wait(error: Any) -> str:
    seconds = wait_of(error)
    return "a while" if seconds is None else f"{seconds:.0f} seconds"


def _of_the_system(error: OSError, what: str) -> KronaError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{what}: the disk is full.", fix="Free some space; nothing half-written is left.")
    if error.errno is None and "onsistency" in str(error):
        return IntegrityError(f"{what}: what came is not as long as the Hub says.", fix="Try again.")
    return ResourceError(f"{what}: {error.strerror or _first_line(error)}.", fix="Check the disk and your rights.")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
