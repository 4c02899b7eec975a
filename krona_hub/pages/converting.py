"""The page of a conversion that was done or refused: what `krona convert --report` writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from krona_hub.conversion import ConversionReport
from krona_hub.formats.reading.reader import read
from krona_hub.rendering.html.conversion_page import conversion_page
from krona_hub.rendering.html.markup import write_page
from krona_hub.sources import resolve


def report_conversion(
    out: str | Path, source: str, report: ConversionReport, options: Mapping[str, Any], instead: str = ""
) -> Path:
    """Read the source once more, as the conversion with these options did, and write the page.

    Of a conversion that was refused, `instead` is the advice.
    """
    before = read(
        resolve(source),
        base=options.get("base"),
        format=options.get("from_format"),
        component=options.get("component"),
        allow_missing=bool(options.get("allow_missing")),
    )
    return write_page(out, conversion_page(report, before, instead))
