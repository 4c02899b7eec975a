"""The page of a file, from its path: what `krona inspect --report` writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from krona_hub.errors import KronaError
from krona_hub.formats.compatibility.tools import Verdict
from krona_hub.formats.reading.describe import Description
from krona_hub.formats.reading.reader import read
from krona_hub.rendering.html.adapter_page import adapter_page
from krona_hub.rendering.html.markup import write_page


def report_file(out: str | Path, about: Description, loads: Mapping[str, Verdict]) -> Path:
    """Read the numbers of the described file and write its page; where they cannot be read, the page says why."""
    try:
        adapter, unread = read(about.path, base=about.base, format=about.format, allow_missing=True), ""
    except KronaError as error:
        adapter, unread = None, error.cause
    return write_page(out, adapter_page(about, loads, adapter, unread))
