"""The base model shipped in the package: its name resolves to a folder with weights."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

SHIPPED = ("tiny-scenes",)  # folders of krona_hub.assets, and catalog names


def folder_of(source: str | Path) -> Path:
    """Return the folder of a shipped base, or any other source as a path. An existing path takes precedence.

    >>> folder_of("tiny-scenes").name, str(folder_of("models/mine"))
    ('tiny-scenes', 'models/mine')
    """
    path = Path(source)
    if str(source).lower() not in SHIPPED or path.exists():
        return path
    folder = Path(str(files("krona_hub.assets"))) / str(source).lower()
    return folder if folder.is_dir() else path
