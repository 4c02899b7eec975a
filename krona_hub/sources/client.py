"""The Hub client as krona configures it: with timeouts, and with validation of file digests in responses."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from krona_hub.errors import IntegrityError
from krona_hub.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CONNECT, READ = 10.0, 60.0  # timeouts in seconds: to connect, and to read
DEFAULT_ENDPOINT = "https://huggingface.co"
CLIENT = "huggingface_hub"  # name of its logger
LARGE = 20_000_000  # bytes; larger transfers show a progress bar
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_lock, _installed = threading.Lock(), False


def client(endpoint: str | None = None) -> HfApi:
    """Return a client that identifies as krona-hub; `endpoint` is the URL of the Hub or of a compatible server.

    The token comes from `hf auth login` or the environment, never from an argument.
    """
    from huggingface_hub import HfApi

    _install()
    return HfApi(endpoint=endpoint_of(endpoint), library_name="krona-hub", library_version=__version__)


def endpoint_of(endpoint: str | None = None) -> str:
    return (endpoint or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE keeps the client offline."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def quiet(nbytes: int = 0) -> Iterator[None]:
    """Suppress the client's warnings, since krona reports what matters itself.

    Progress bars stay for transfers of at least LARGE bytes on a terminal. Several threads can be inside the block:
    the first to enter saves the settings, the last to leave restores them.
    """
    global _before
    with _lock:
        _inside.append(nbytes)
        _before = _before or _current_output()
        _set_bars(_before.bars and max(_inside) >= LARGE and sys.stderr.isatty())
        logging.getLogger(CLIENT).setLevel(logging.ERROR)
    try:
        yield
    finally:
        with _lock:
            _inside.remove(nbytes)
            if not _inside:
                logging.getLogger(CLIENT).setLevel(_before.level)
                _set_bars(_before.bars)
                _before = None


class _ClientOutput(NamedTuple):
    """Log level and progress bars of the client."""

    level: int
    bars: bool


_inside: list[int] = []  # bytes to transfer, per thread inside `quiet`
_before: _ClientOutput | None = None


def _current_output() -> _ClientOutput:
    from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]

    return _ClientOutput(logging.getLogger(CLIENT).level, not are_progress_bars_disabled())


def _set_bars(wanted: bool) -> None:
    from huggingface_hub import utils

    if wanted == utils.are_progress_bars_disabled():  # type: ignore[attr-defined]
        (utils.enable_progress_bars if wanted else utils.disable_progress_bars)()  # type: ignore[attr-defined]


@contextmanager
def without_xet() -> Iterator[None]:
    """Upload over LFS: the client has no fallback for servers without Xet (huggingface_hub #4786)."""
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def _install() -> None:
    """Wrap the current client factory, once per process: by default the client has no timeouts."""
    global _installed
    with _lock:
        if _installed:
            return
        from huggingface_hub.utils import _http, set_client_factory  # type: ignore[attr-defined]

        set_client_factory(_with_timeouts(_http._GLOBAL_CLIENT_FACTORY))
        _installed = True


def _with_timeouts(factory: Callable[[], Any]) -> Callable[[], Any]:
    def make() -> Any:
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

        http = factory()
        if http.timeout == httpx.Timeout(None):
            http.timeout = httpx.Timeout(READ, connect=CONNECT)
        hooks = http.event_hooks
        http.event_hooks = {**hooks, "response": [*hooks.get("response", []), check_names]}
        return http

    return make


def check_names(response: Any) -> None:
    """Reject an ETag or a commit that is not a digest: the client uses both as file names, even with `../`."""
    if "/resolve/" not in response.request.url.path:
        return
    for header, pattern in (("X-Linked-Etag", _ETAG), ("X-Repo-Commit", _COMMIT)):
        _check(header, response.headers.get(header), pattern)
    if "X-Linked-Etag" not in response.headers and "X-Repo-Commit" in response.headers:
        _check("ETag", response.headers.get("ETag"), _ETAG)


def _check(header: str, value: str | None, pattern: re.Pattern[str]) -> None:
    if value is not None and not pattern.fullmatch(value.removeprefix("W/").strip('"')):
        raise IntegrityError(
            f"the server sent the {header} {value[:80]!r}, which is not a digest.",
            fix="The server is not the Hub, or a proxy interferes: check HF_ENDPOINT and the proxy.",
        )
