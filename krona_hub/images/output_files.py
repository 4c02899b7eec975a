"""Write the output: numbered PNGs that contain their record, the grid, and record.json."""

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


def image_name(number: int, count: int) -> str:
    """
    >>> image_name(7, 12), image_name(7, 1200)
    ('007.png', '0007.png')
    """
    return f"{number:0{max(3, len(str(count)))}}.png"


def pixels_sha256(image: Any) -> str:
    """Hash the size and the pixels of an image, independent of metadata in its file."""
    return sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def check_output_folder(out: Path, overwrite: bool) -> None:
    """Raise what writing to the folder would raise, before any image is generated."""
    check_folder(out, overwrite=overwrite)
    if overwrite and out.exists() and any(out.iterdir()) and not (out / RECORD).exists():
        raise ConflictError(
            f"{str(out)!r} is not empty and not an output of krona generate.", fix="Choose another folder with -o."
        )


def prepare_folder(out: Path) -> None:
    """Create the folder, or remove the images that the record of an earlier run names."""
    try:
        out.mkdir(exist_ok=True)
        for name in (*_recorded(out), RECORD):
            (out / name).unlink(missing_ok=True)
    except OSError as problem:
        raise ResourceError(f"{out}: {problem.strerror}.", fix="Choose another folder with -o.") from problem


def _recorded(out: Path) -> Iterable[str]:
    try:
        record = read_record(out)
        names = [record.get("grid"), *(image["file"] for image in record.get("pictures", ()))]
    except KronaError:
        return ()
    return [name for name in names if isinstance(name, str) and Path(name).name == name and name.endswith(".png")]


def write_images(out: Path, images: Iterable[tuple[GeneratedImage, Any]], record: Mapping[str, Any]) -> None:
    """Write each image as a PNG with its record as text: in full under `krona`, summarized under `parameters`."""
    for entry, image in images:
        alone = of_one(record, entry)
        _write_png(out / entry.file, image, {"parameters": parameters_text(alone), KEY: json.dumps(alone)})


def write_grid(out: Path, grid: Any, record: Mapping[str, Any]) -> None:
    """Write the grid, with the record of all images."""
    _write_png(out / GRID, grid, {KEY: json.dumps(record)})


def write_record(out: Path, record: Mapping[str, Any]) -> None:
    """Write record.json, last of all files: its presence marks a complete run."""
    atomic_text(out / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n", overwrite=True)


def _write_png(path: Path, image: Any, texts: Mapping[str, str]) -> None:
    from PIL.PngImagePlugin import PngInfo

    info, content = PngInfo(), io.BytesIO()
    for key, text in texts.items():
        info.add_itxt(key, text)
    image.save(content, "PNG", pnginfo=info)
    with atomic_file(path, overwrite=True) as file:
        file.write(content.getvalue())


def planned_images(plan: GeneratePlan) -> tuple[GeneratedImage, ...]:
    """Return the planned images row by row, without their pixels."""
    cells = [(row, column) for row in plan.rows for column in plan.columns]
    return tuple(
        GeneratedImage(image_name(n, plan.count), row.prompt, row.seed, column.label, column.base, column.weights)
        for n, (row, column) in enumerate(cells, start=1)
    )


def grid_name(plan: GeneratePlan) -> str | None:
    """The name of the grid; None for a single image."""
    return GRID if plan.count > 1 else None
