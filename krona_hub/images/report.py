"""The report of `generate`. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class GeneratedImage:
    """A planned or generated image."""

    file: str  # in the folder of the report
    prompt: str
    seed: int
    column: str  # label
    base: str  # source
    adapters: Mapping[str, float]  # name -> strength, none of them 0
    pixels: str = ""  # sha256 of its size and pixels; "" in a dry run


class PixelDifference(NamedTuple):
    """The difference between the images of a column and those of the column to its left."""

    first: str  # label
    second: str
    levels: float  # mean absolute difference of pixel values, out of 255


@dataclass(frozen=True)
class GenerateReport:
    """The images in rows and columns, and the settings they were generated with."""

    out: Path | None  # the folder; None if nothing was written
    pictures: tuple[GeneratedImage, ...]  # row by row
    columns: tuple[str, ...]  # labels
    rows: int
    grid: str | None  # file in the folder
    record: Mapping[str, Any]  # the contents of record.json, which repeat the images
    seconds: float  # of generating, without loading
    written: bool
    notes: tuple[str, ...] = ()
    differences: tuple[PixelDifference, ...] = ()  # between neighboring columns
    images: tuple[Any, ...] = field(default=(), repr=False)  # PIL images, in the order of `pictures`
    grid_image: Any = field(default=None, repr=False)
    same: int | None = None  # images equal to those of the repeated record, pixel by pixel
