"""An identity score without a model: the vivid colors of an image, and their height within the subject.

    score(image, references) = max over references of Σ min(h(image), h(reference))   in [0, 1]

h is the fraction of vivid pixels in each hue and in each of BANDS bands of height, between the top and the bottom of
all vivid pixels. The score ignores shapes, and subjects without vivid colors. It suits rendered toys in muted rooms and
needs neither weights nor a network. For photographs, use the models of `embedders.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 64  # longer side in pixels after downscaling
HUES, BANDS = 24, 2  # number of hue bins; number of height bands: upper and lower
NEAR = 60.0  # degrees: a hue counts for all bins within this distance, with decreasing weight
RECOGNIZED = 0.7  # threshold between renders of a toy and of other toys
SATURATION, BRIGHTNESS = 0.55, 60  # minimum of vivid pixels; brightness out of 255
LEAST = 0.01  # minimum fraction of vivid pixels in an image with a subject
Histogram = NDArray[np.float64]  # (BANDS, HUES), sums to 1; all zeros without a subject


def identity(image: Image.Image, references: Sequence[Image.Image]) -> float:
    """Return the score of an image: 1 for a reference itself, 0 without a vivid subject.

    >>> red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    >>> identity(red, [red, blue]), identity(blue, [red])
    (1.0, 0.0)
    """
    own = histogram(image)
    return max(float(np.minimum(own, histogram(each)).sum()) for each in references)


def histogram(image: Image.Image) -> Histogram:
    """Return the hue histogram by height. Neighboring bins overlap, so that small changes in light matter little."""
    pixels = _small(image)
    high, low = pixels.max(2), pixels.min(2)
    vivid = (high - low > SATURATION * high) & (high > BRIGHTNESS)
    counts = np.zeros((BANDS, HUES))
    rows = np.nonzero(vivid)[0]
    if len(rows) < LEAST * vivid.size:
        return counts
    band = (rows - rows.min()) * BANDS // (rows.max() - rows.min() + 1)
    np.add.at(counts, band, _bins(_hues(pixels[vivid])))
    shares: Histogram = counts / counts.sum()
    return shares


def _bins(hues: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the (n, HUES) bin weights of (n,) degrees."""
    distance = np.abs((hues[:, None] - np.arange(HUES) * 360 / HUES + 180) % 360 - 180)
    near = np.maximum(0, 1 - distance / NEAR)
    shares: NDArray[np.float64] = near / near.sum(1, keepdims=True)
    return shares


def _small(image: Image.Image) -> NDArray[np.float64]:
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image if image.size == size else image.resize(size, Image.Resampling.BOX)
    return np.asarray(small.convert("RGB"), np.float64)


def _hues(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the (n,) hues in [0, 360) degrees of (n, 3) pixels."""
    r, g, b = pixels.T
    degrees: NDArray[np.float64] = np.rad2deg(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)) % 360
    return degrees
