"""Describe an adapter on the Hub by its header alone: a few kilobytes, whatever the size of the file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

from krona_hub.checkpoints import strict_json
from krona_hub.errors import IntegrityError, KronaError, ResourceError
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.description import Description
from krona_hub.hub.repo_layout import CONFIG, HEADER_SIZE, MAX_HEADER, WEIGHTS
from krona_hub.sources.choose_file import with_companions
from krona_hub.sources.client import client, quiet
from krona_hub.sources.client_errors import hub_errors
from krona_hub.sources.download import fetch
from krona_hub.sources.repo_listing import Listing
from krona_hub.sources.retry import retrying
from krona_hub.sources.safe_names import printable

FIRST = 100_000  # bytes; most headers fit
MAX_CONFIG = 1 << 20


@dataclass(frozen=True)
class Preview:
    """The description of an adapter that was not downloaded."""

    name: str  # file name
    size: int  # bytes
    description: Description | None  # None if krona does not know the file
    config: dict[str, Any] | None
    why_not: str = ""  # what is wrong with the file


def preview(listing: Listing, name: str, *, endpoint: str | None = None) -> Preview:
    """Describe a file of a repository by its header and config.json; scales of foreign formats remain unknown.

    An invalid header is reported in `why_not`. Raises network errors, and ResourceError beyond the limits.
    """
    size = listing.files[name].size or 0
    config = _config(listing, endpoint) if name == WEIGHTS else None
    with sparse_copy(listing, name, endpoint=endpoint, guess=_header_size(config)) as path:
        try:
            return Preview(name, size, describe(path), config)
        except KronaError as error:
            return Preview(name, size, None, config, printable(error.cause.replace(str(path), name), 300))


@contextmanager
def sparse_copy(listing: Listing, name: str, *, endpoint: str | None = None, guess: int = FIRST) -> Iterator[Path]:
    """Yield a sparse local file with the header and the length of the one on the Hub, but without its tensor data.

    Configuration files that it needs are beside it. For a cached listing, it is the cached file itself.
    `guess` is the expected size of the header in bytes.
    """
    if listing.cached:
        yield fetch(listing, name)
        return
    header = _header(listing, name, endpoint, guess)
    with TemporaryDirectory(prefix="krona-preview-") as folder:
        for beside in with_companions(name, listing.files)[1:]:
            (Path(folder) / beside.rpartition("/")[2]).write_bytes(_small(listing, beside, endpoint))
        path = Path(folder) / name.rpartition("/")[2]
        with path.open("wb") as file:
            file.write(header)
            file.truncate(max(listing.files[name].size or 0, len(header)))
        yield path


def _header_size(config: Mapping[str, Any] | None) -> int:
    """Bytes up to the end of the header: from config.json if plausible, else enough for most headers."""
    size = (config or {}).get(HEADER_SIZE)
    return size if isinstance(size, int) and FIRST < size <= MAX_HEADER else FIRST


def _header(listing: Listing, name: str, endpoint: str | None, guess: int) -> bytes:
    """Return a safetensors file up to the end of its header, or the first bytes of any other file."""
    size = listing.files[name].size or 0
    if not size:
        return b""
    first, url = read_range(listing, name, 0, min(guess, size), endpoint)
    length = int.from_bytes(first[:8], "little")
    if first[8:9] != b"{" or 8 + length > size:
        return first
    if length > MAX_HEADER:
        fix = "Do not trust this file: no adapter needs that."
        raise ResourceError(f"{listing.repo}/{name} has a header of {length:,} bytes.", fix=fix)
    rest = 8 + length - len(first)
    more = read_range(listing, name, len(first), rest, endpoint, url)[0] if rest > 0 else b""
    return (first + more)[: 8 + length]


def read_range(
    listing: Listing, name: str, start: int, count: int, endpoint: str | None, url: str | None = None
) -> tuple[bytes, str]:
    """Return `count` bytes of a file on the Hub from `start`, and the URL that served them after redirects.

    The token is sent to the Hub only. `url` is such a URL, from an earlier read of the same file.
    """
    with hub_errors(f"{listing.repo}/{name}"), quiet():
        return retrying(lambda: _read_once(listing, name, start, count, endpoint, url))


def _read_once(
    listing: Listing, name: str, start: int, count: int, endpoint: str | None, url: str | None
) -> tuple[bytes, str]:
    from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]

    api = client(endpoint)
    url = url or f"{api.endpoint}/{listing.repo}/resolve/{listing.commit}/{quote(name)}"
    headers = api._build_hf_headers() if url.startswith(f"{api.endpoint}/") else {}
    wanted = {**headers, "Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=wanted) as answer:
        if answer.is_error:
            answer.read()
        hf_raise_for_status(answer)
        whole = answer.status_code == 200  # the server ignores ranges
        skip = start if whole else _checked_start(answer.headers.get("Content-Range", ""), start, name)
        data = bytearray()
        for piece in answer.iter_bytes():
            data += piece
            if len(data) >= skip + count:
                break
    return bytes(data[skip : skip + count]), str(answer.url)


def _checked_start(content_range: str, start: int, name: str) -> int:
    """Return 0, the offset of `start` in the response. Raises IntegrityError if the server sent another range."""
    found = re.match(r"bytes (\d+)-", content_range)
    if not found or int(found[1]) != start:
        raise IntegrityError(f"The server sent a different byte range of {name}.", fix="Check the proxy.")
    return 0


def _config(listing: Listing, endpoint: str | None) -> dict[str, Any] | None:
    data = _small(listing, CONFIG, endpoint)
    try:
        return strict_json.parse(data) if data else None
    except KronaError:
        return None


def _small(listing: Listing, name: str, endpoint: str | None) -> bytes:
    """Return a small file of a repository, or nothing if it is missing or not small."""
    known = listing.files.get(name)
    if known is None or not 0 < (known.size or 0) <= MAX_CONFIG:
        return b""
    if listing.cached:
        return fetch(listing, name).read_bytes()
    return read_range(listing, name, 0, known.size or 0, endpoint)[0]


def describe_preview(preview: Preview) -> dict[str, Any]:
    """Return a preview as plain values, for display and JSON."""
    from krona_hub.formats.compatibility.verdicts import loads_in

    d = preview.description
    if d is None:
        known: dict[str, Any] = dict.fromkeys(("format", "base", "layers", "parameters", "schema"))
        return {**known, "trigger_words": (), "loads_in": (), "problem": preview.why_not or None}
    return {
        "format": d.format,
        "base": (preview.config or {}).get("base_model") or d.base,
        "layers": len(d.modules),
        "parameters": d.parameters,
        "schema": d.schema,
        "trigger_words": tuple(map(printable, d.trigger_words)),
        "loads_in": tuple(tool for tool, verdict in loads_in(d).items() if verdict.ok),
        "problem": None,
    }
