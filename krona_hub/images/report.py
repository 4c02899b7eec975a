"""What `generate` made. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class GeneratedImage:
    """One picture."""

    file: str  # in the folder of the report
    prompt: str
    seed: int
    column: str  # label
    base: str  # source
    adapters: Mapping[str, float]  # name -> strength, none of them 0
    pixels: str = ""  # sha256 of its numbers; "" before it is made


class PixelDifference(NamedTuple):
    """How much the pictures of one column differ from those of the column to its left."""

    first: str  # label
    second: str
    levels: float  # mean absolute difference of the pixels' numbers, of 255


@dataclass(frozen=True)
class GenerateReport:
    """The pictures in rows and columns, and what they were made with."""

    out: Path | None  # the folder; None: nothing was written
    pictures: tuple[GeneratedImage, ...]  # row by row
    columns: tuple[str, ...]  # labels
    rows: int
    grid: str | None  # file in the folder
    record: Mapping[str, Any]  # enough to make the same pictures again: what record.json holds
    seconds: float  # of drawing, without loading
    written: bool
    notes: tuple[str, ...] = ()
    differences: tuple[PixelDifference, ...] = ()  # of each column from the one before
    images: tuple[Any, ...] = field(default=(), repr=False)  # PIL images, in the order of `pictures`
    grid_image: Any = field(default=None, repr=False)
    same: int | None = None  # pictures equal to those of the record that was repeated, pixel by pixel
