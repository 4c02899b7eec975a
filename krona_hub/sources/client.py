"""The client of the Hub, as krona uses it: with time limits, and with a check of what servers say about files."""

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

CONNECT, READ = 10.0, 60.0  # seconds that a server may take to accept, and to say the next thing
DEFAULT_ENDPOINT = "https://huggingface.co"
CLIENT = "huggingface_hub"  # its logger
LARGE = 20_000_000  # bytes that take long enough to be watched
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_lock, _installed = threading.Lock(), False


def client(endpoint: str | None = None) -> HfApi:
    """The client, with krona's name in its requests. `endpoint` is the address of the Hub, or of one like it.

    The token is the one that `hf auth login` or the environment gives; it is never taken as an argument.
    """
    from huggingface_hub import HfApi

    _install()
    return HfApi(endpoint=endpoint_of(endpoint), library_name="krona-hub", library_version=__version__)


def endpoint_of(endpoint: str | None = None) -> str:
    return (endpoint or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def is_offline() -> bool:
    """Whether the user keeps the client offline with HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def quiet(nbytes: int = 0) -> Iterator[None]:
    """Without the client's own warnings: krona says in its own words what matters of them.

    Its bars stay where so many bytes take their time and somebody sits before a terminal. Several threads may be in
    here: the first one in remembers how things were, the last one out puts them back.
    """
    global _before
    with _lock:
        _inside.append(nbytes)
        _before = _before or _as_it_is()
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


class _Talk(NamedTuple):
    """How much the client says."""

    level: int
    bars: bool


_inside: list[int] = []  # bytes that the threads in `quiet` move
_before: _Talk | None = None


def _as_it_is() -> _Talk:
    from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]

    return _Talk(logging.getLogger(CLIENT).level, not are_progress_bars_disabled())


def _set_bars(wanted: bool) -> None:
    from huggingface_hub import utils

    if wanted == utils.are_progress_bars_disabled():  # type: ignore[attr-defined]
        (utils.enable_progress_bars if wanted else utils.disable_progress_bars)()  # type: ignore[attr-defined]


@contextmanager
def without_xet() -> Iterator[None]:
    """Uploads over LFS: the client itself does not go back to it where a Hub has no Xet (huggingface_hub #4786)."""
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


def _install() -> None:
    """Wrap the client factory that is in place, once per process: the client by itself waits for ever."""
    global _installed
    with _lock:
        if _installed:
            return
        from huggingface_hub.utils import _http, set_client_factory  # type: ignore[attr-defined]

        set_client_factory(_careful(_http._GLOBAL_CLIENT_FACTORY))
        _installed = True


def _careful(factory: Callable[[], Any]) -> Callable[[], Any]:
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
    """Refuse an ETag or a commit that is no digest: the client makes file names of both, `../` and all."""
    if "/resolve/" not in response.request.url.path:
        return
    for header, form in (("X-Linked-Etag", _ETAG), ("X-Repo-Commit", _COMMIT)):
        _check(header, response.headers.get(header), form)
    if "X-Linked-Etag" not in response.headers and "X-Repo-Commit" in response.headers:
        _check("ETag", response.headers.get("ETag"), _ETAG)


def _check(header: str, value: str | None, form: re.Pattern[str]) -> None:
    if value is not None and not form.fullmatch(value.removeprefix("W/").strip('"')):
        raise IntegrityError(
            f"the server names a file with the {header} {value[:80]!r}, which is no digest.",
            fix="This is not the Hub, or somebody is in between: check HF_ENDPOINT and the proxy.",
        )
