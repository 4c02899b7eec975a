"""The client of the Hub, as krona uses it: with time limits, and with a check of what servers say about files."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from krona_hub.errors import IntegrityError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CONNECT, READ = 10.0, 60.0  # seconds that a server may take to accept, and to say the next thing
DEFAULT_ENDPOINT = "https://huggingface.co"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_lock, _installed = threading.Lock(), False


def client(endpoint: str | None = None) -> HfApi:
    """The client, with krona's name in its requests. `endpoint` is the address of the Hub, or of one like it.

    The token is the one that `hf auth login` or the environment gives; it is never taken as an argument.
    """
    from huggingface_hub import HfApi

    _install()
    return HfApi(endpoint=endpoint_of(endpoint), library_name="krona-hub", library_version=version("krona-hub"))


def endpoint_of(endpoint: str | None = None) -> str:
    return (endpoint or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def is_offline() -> bool:
    """Whether the user keeps the client offline with HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the client's own bars and warnings: krona says in its own words what matters of them."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    log, had_bars = logging.getLogger("huggingface_hub"), not are_progress_bars_disabled()
    level = log.level
    log.setLevel(logging.ERROR)
    if had_bars:
        disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if had_bars:
            enable_progress_bars()


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
