"""Open images as upright 8-bit RGB and fit them into size buckets, with Pillow and numpy and without torch."""

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

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
BACKGROUND = (255, 255, 255)  # of transparent images
HIGH_DEPTH_MODES = (
    "I;16",
    "I;16B",
    "I;16L",
    "I;16N",
    "I",
    "F",
)  # modes of more than 8 bits, which convert() clips
DECODE_ERRORS = (  # raised by decoders on corrupt files or EXIF data
    OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, struct.error, zlib.error
)  # fmt: skip
Pixels = NDArray[np.uint8]  # (height, width, 3)


WIDEST = 2.0  # maximum ratio of the longer to the shorter side
Size = tuple[int, int]  # (width, height) in pixels


def open_image(path: Path) -> Image.Image:
    """Open an image as upright 8-bit RGB.

    EXIF orientation is applied, transparency becomes white, CMYK and palettes are converted, and 16 bits are scaled
    (never clipped) to 8. Raises DataError if the file is not an image or is corrupt.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except (UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{path.name} is not a readable image: {_line(error, path)}.", fix=_FIX) from error
    except DECODE_ERRORS as error:
        raise DataError(f"{path.name} is corrupt: {_line(error, path)}.", fix=_FIX) from error


_FIX = "Remove or replace it, or skip it with --skip-bad."


def _line(error: BaseException, path: Path) -> str:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return first.replace(str(path), path.name).rstrip(".")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in HIGH_DEPTH_MODES:
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


def fitted(image: Image.Image, size: tuple[int, int]) -> tuple[Pixels, tuple[int, int]]:
    """Scale an image to cover `size` (width, height) and crop its center. Return the pixels and the crop (top, left).

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
    """Return sizes with sides in multiples of `multiple` and an area of at most resolution², widest last.

    The largest square is always included.

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
    """Return the bucket with the nearest aspect ratio on a logarithmic scale, and of several the largest.

    >>> nearest_bucket((400, 300), bucket_sizes(512, 64))
    (576, 448)
    """
    ratio = log(size[0] / size[1])
    return min(sizes, key=lambda s: (abs(log(s[0] / s[1]) - ratio), -s[0] * s[1]))
