"""All that is wrong with the structure of a safetensors file, in one go. Torch-free."""

from __future__ import annotations

from pathlib import Path

from krona_hub.checkpoints.findings import Finding
from krona_hub.checkpoints.header import examine
from krona_hub.errors import KronaError


def findings(path: Path | str) -> tuple[Finding, ...]:
    """Every structural problem of the file; () for a sound one. Raises nothing that read_header would raise."""
    try:
        return examine(path)[1]
    except KronaError as error:
        return (Finding.of(error),)
