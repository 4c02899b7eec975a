"""A picture file of any kind becomes 8-bit RGB, upright; what cannot is named. Pillow and numpy, no torch."""

from __future__ import annotations

import struct
import warnings
import zlib
from math import log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from krona_hub.errors import DataError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
BACKGROUND = (255, 255, 255)  # behind what is transparent
DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # modes of more than 8 bits, which convert() would clip
BROKEN = (  # what broken files, or broken EXIF in them, make decoders raise
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, struct.error, zlib.error
)  # fmt: skip
Picture = NDArray[np.uint8]  # (height, width, 3)


WIDEST = 2.0  # longest side : shortest side
Size = tuple[int, int]  # (width, height) in pixels


def open_picture(path: Path) -> Image.Image:
    """The picture as upright 8-bit RGB: EXIF orientation applied, transparency on white, CMYK and palettes converted,
    16 bits scaled (never clipped) to 8. Raises DataError where the file is none, or ends early.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except (UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path.name} is no picture that can be read: {_line(error, path)}.", fix=_FIX) from error
    except BROKEN as error:
        raise DataError(f"{path.name} is broken: {_line(error, path)}.", fix=_FIX) from error


_FIX = "Remove or replace it, or continue without it: --skip-bad."


def _line(error: BaseException, path: Path) -> str:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return first.replace(str(path), path.name).rstrip(".")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in DEEP:
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (*BACKGROUND, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """
    >>> _eight_bits(np.array([[0, 257, 65535]], np.uint16))
    array([[  0,   1, 255]], dtype=uint8)
    """
    numbers = values.astype(np.float64)
    top = 255.0 if values.dtype.kind != "u" and numbers.max(initial=0) <= 255 else 65535.0
    if values.dtype.kind == "f" and numbers.max(initial=0) <= 1:
        top = 1.0
    return np.rint(np.clip(numbers / top, 0, 1) * 255).astype(np.uint8)


def fitted(image: Image.Image, size: tuple[int, int]) -> tuple[Picture, tuple[int, int]]:
    """The picture at `size` (width, height): scaled to cover it, the middle cut out; and (top, left) of the cut.

    >>> fitted(Image.new("RGB", (80, 40)), (32, 32))[0].shape, fitted(Image.new("RGB", (80, 40)), (32, 32))[1]
    ((32, 32, 3), (0, 16))
    """
    width, height = size
    scale = max(width / image.width, height / image.height)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    scaled = image.resize(covering, Image.Resampling.LANCZOS)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return np.asarray(scaled.crop((left, top, left + width, top + height))), (top, left)


def bucket_sizes(resolution: int, multiple: int, widest: float = WIDEST) -> tuple[Size, ...]:
    """Sizes whose sides are multiples and whose area is at most resolution², widest last; the square is among them.

    >>> bucket_sizes(64, 16)
    ((48, 80), (64, 64), (80, 48))
    """
    side = max(multiple, resolution // multiple * multiple)
    found = {(side, side)}
    width = multiple
    while width <= side * sqrt(widest):
        height = side * side // width // multiple * multiple
        if height and max(width, height) <= widest * min(width, height):
            found |= {(width, height), (height, width)}
        width += multiple
    return tuple(sorted(found, key=lambda s: (s[0] / s[1], s)))


def nearest_bucket(size: Size, sizes: tuple[Size, ...]) -> Size:
    """The bucket whose proportions are nearest, on a logarithmic scale; the larger one of two.

    >>> nearest_bucket((400, 300), bucket_sizes(512, 64))
    (576, 448)
    """
    ratio = log(size[0] / size[1])
    return min(sizes, key=lambda s: (abs(log(s[0] / s[1]) - ratio), -s[0] * s[1]))
