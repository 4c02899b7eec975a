"""The base that ships in the package: its name leads to a folder with weights, as a path would."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

SHIPPED = ("tiny-scenes",)  # folders of krona_hub.assets, and catalogue names


def folder_of(source: str | Path) -> Path:
    """The folder of a shipped base's name; any other source as a path. A path that exists comes before a name.

    >>> folder_of("tiny-scenes").name, str(folder_of("models/mine"))
    ('tiny-scenes', 'models/mine')
    """
    path = Path(source)
    if str(source).lower() not in SHIPPED or path.exists():
        return path
    folder = Path(str(files("krona_hub.assets"))) / str(source).lower()
    return folder if folder.is_dir() else path
