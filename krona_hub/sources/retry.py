"""Retrying requests after transient errors: an overloaded Hub, and interrupted connections."""

from __future__ import annotations

import builtins
import time
from collections.abc import Callable
from typing import TypeVar

from krona_hub.sources.client_errors import wait_of

T = TypeVar("T")
TRIES = 4
PAUSES = (1.0, 2.0, 4.0)  # seconds before the second try, the third, …
LONGEST = 60.0  # seconds; longer waits are reported as errors
sleep = time.sleep  # replaced in tests


def retrying(work: Callable[[], T], *, tries: int = TRIES) -> T:
    """Return the result of `work`, retried after responses 429 and 5xx and after interrupted connections.

    Raises the error of the last attempt. Refused connections are not retried.
    """
    for attempt in range(tries - 1):
        try:
            return work()
        except Exception as error:
            pause = pause_before_next(error, attempt)
            if pause is None:
                raise
        sleep(pause)
    return work()


def pause_before_next(error: BaseException, attempt: int) -> float | None:
    """Return the seconds to wait before the next attempt; None for errors that are not retried."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    if isinstance(error, errors.HfHubHTTPError):
        if error.response.status_code not in (429, 500, 502, 503, 504):
            return None
        requested = wait_of(error)
        return None if (requested or 0) > LONGEST else requested or PAUSES[min(attempt, len(PAUSES) - 1)]
    if isinstance(error, httpx.ConnectError):
        return None
    interrupted = (httpx.TransportError, builtins.ConnectionError)
    return PAUSES[min(attempt, len(PAUSES) - 1)] if isinstance(error, interrupted) else None
