"""Sample pictures that go with an adapter: few, small, and really pictures."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

from krona_hub.errors import FormatError, NotFoundError, ResourceError
from krona_hub.hub.repo_layout import IMAGES, MAX_IMAGE, MAX_IMAGES, PICTURES
from krona_hub.rendering.tables import human_bytes

FIRST_BYTES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}


class Picture(NamedTuple):
    """A picture of the repository."""

    name: str  # in the repository
    prompt: str  # of the text file beside it; "" where there is none


def gather(source: Path, folder: Path) -> tuple[Picture, ...]:
    """Copy the pictures of `source` into `folder`/images. A text file of the same name is a picture's prompt.

    Raises NotFoundError without pictures, ResourceError for too many or too large ones, FormatError for what is none.
    """
    found = sorted(p for p in source.iterdir() if p.suffix.lower() in PICTURES) if source.is_dir() else []
    if not found:
        raise NotFoundError(f"{source}: no pictures there.", fix=f"--images takes a folder of {', '.join(PICTURES)}.")
    if len(found) > MAX_IMAGES:
        raise ResourceError(f"{source} has {len(found)} pictures.", fix=f"Choose the best {MAX_IMAGES}.")
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    return tuple(_taken(path, folder, number) for number, path in enumerate(found, 1))


def _taken(path: Path, folder: Path, number: int) -> Picture:
    size = path.stat().st_size
    if size > MAX_IMAGE:
        fix = f"A picture may have {human_bytes(MAX_IMAGE)}: save it smaller, or as JPEG."
        raise ResourceError(f"{path} has {human_bytes(size)}.", fix=fix)
    with path.open("rb") as file:
        first = file.read(4)
    if not any(first.startswith(start) for start in FIRST_BYTES):
        raise FormatError(f"{path} is no picture.", fix="Save it as PNG.")
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-") or "sample"
    name = f"{IMAGES}{number:02d}-{stem[:60]}{path.suffix.lower()}"
    shutil.copyfile(path, folder / name)
    return Picture(name, _prompt(path.with_suffix(".txt")))


def _prompt(words: Path) -> str:
    try:
        return words.read_text(encoding="utf-8-sig").strip() if words.is_file() else ""
    except UnicodeDecodeError as error:
        raise FormatError(f"{words} is no text in UTF-8.", fix="Save it as UTF-8.") from error
