"""Writes what was made: numbered PNGs that carry their record, the grid, record.json."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from krona_hub.checkpoints.atomic import atomic_file, atomic_text, check_folder
from krona_hub.errors import ConflictError, KronaError, ResourceError
from krona_hub.images.plan import GeneratePlan
from krona_hub.images.record import KEY, of_one, parameters_text, read_record
from krona_hub.images.report import GeneratedImage

GRID, RECORD = "grid.png", "record.json"


def picture_name(number: int, count: int) -> str:
    """
    >>> picture_name(7, 12), picture_name(7, 1200)
    ('007.png', '0007.png')
    """
    return f"{number:0{max(3, len(str(count)))}}.png"


def pixels_sha256(image: Any) -> str:
    """Of the size and the numbers of a picture, whatever its file says besides."""
    return sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def check_place(out: Path, overwrite: bool) -> None:
    """Raise what writing there would raise, before anything is drawn."""
    check_folder(out, overwrite=overwrite)
    if overwrite and out.exists() and any(out.iterdir()) and not (out / RECORD).exists():
        raise ConflictError(
            f"{str(out)!r} is not empty, and no folder of krona generate.", fix="Choose another folder with -o."
        )


def make_place(out: Path) -> None:
    """The folder, without the pictures of an earlier run: only those that its record names."""
    try:
        out.mkdir(exist_ok=True)
        for name in (*_recorded(out), RECORD):
            (out / name).unlink(missing_ok=True)
    except OSError as problem:
        raise ResourceError(f"{out}: {problem.strerror}.", fix="Choose another folder with -o.") from problem


def _recorded(out: Path) -> Iterable[str]:
    try:
        record = read_record(out)
        names = [record.get("grid"), *(picture["file"] for picture in record.get("pictures", ()))]
    except KronaError:
        return ()
    return [name for name in names if isinstance(name, str) and Path(name).name == name and name.endswith(".png")]


def write_pictures(out: Path, pictures: Iterable[tuple[GeneratedImage, Any]], record: Mapping[str, Any]) -> None:
    """Each as a PNG with its record in its text: under `krona` all of it, under `parameters` in words."""
    for picture, image in pictures:
        alone = of_one(record, picture)
        _write_png(out / picture.file, image, {"parameters": parameters_text(alone), KEY: json.dumps(alone)})


def write_grid(out: Path, grid: Any, record: Mapping[str, Any]) -> None:
    """The grid, with the record of them all."""
    _write_png(out / GRID, grid, {KEY: json.dumps(record)})


def write_record(out: Path, record: Mapping[str, Any]) -> None:
    """record.json, last of all: where it is, all is there."""
    atomic_text(out / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n", overwrite=True)


def _write_png(path: Path, image: Any, texts: Mapping[str, str]) -> None:
    from PIL.PngImagePlugin import PngInfo

    info, content = PngInfo(), io.BytesIO()
    for key, text in texts.items():
        info.add_itxt(key, text)
    image.save(content, "PNG", pnginfo=info)
    with atomic_file(path, overwrite=True) as file:
        file.write(content.getvalue())


def pictures_of(plan: GeneratePlan) -> tuple[GeneratedImage, ...]:
    """The pictures row by row, before they are made."""
    cells = [(row, column) for row in plan.rows for column in plan.columns]
    return tuple(
        GeneratedImage(picture_name(n, plan.count), row.prompt, row.seed, column.label, column.base, column.weights)
        for n, (row, column) in enumerate(cells, start=1)
    )


def grid_name(plan: GeneratePlan) -> str | None:
    """A single picture needs no grid."""
    return GRID if plan.count > 1 else None
