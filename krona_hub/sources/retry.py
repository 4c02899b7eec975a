"""Trying again what may well work the next time: answers of an overloaded Hub, and broken connections."""

from __future__ import annotations

import builtins
import time
from collections.abc import Callable
from typing import TypeVar

from krona_hub.sources.client_errors import wait_of

T = TypeVar("T")
TRIES = 4
PAUSES = (1.0, 2.0, 4.0)  # seconds before the second try, the third, …
LONGEST = 60.0  # seconds; a Hub that wants more is told about, not waited for
sleep = time.sleep  # tests do not wait


def retrying(work: Callable[[], T], *, tries: int = TRIES) -> T:
    """The result of `work`, tried again after answers 429 and 5xx and after broken connections.

    Raises what the last try raised. A connection that is refused is not tried again: nobody is there.
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
    """Seconds to wait before it is worth trying again; None where it is not."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    if isinstance(error, errors.HfHubHTTPError):
        if error.response.status_code not in (429, 500, 502, 503, 504):
            return None
        asked = wait_of(error)
        return None if (asked or 0) > LONGEST else asked or PAUSES[min(attempt, len(PAUSES) - 1)]
    if isinstance(error, httpx.ConnectError):
        return None
    broken = (httpx.TransportError, builtins.ConnectionError)
    return PAUSES[min(attempt, len(PAUSES) - 1)] if isinstance(error, broken) else None
