"""An identity score without a model: which vivid colours a picture has, and how high up in its subject each of them is.

    score(picture, references) = max over references of Σ min(h(picture), h(reference))   in [0, 1]

h is the share of each hue in each of BANDS of height between the top and the bottom of all vivid pixels. It knows no
shapes, and nothing of subjects without vivid colours: it is for drawn toys in muted rooms, and needs neither weights
nor a network. For photographs take the models of `models.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 64  # pixels along the longer side when it is looked at
HUES, BANDS = 24, 2  # bins of hue; bands of height: above and below
NEAR = 60.0  # degrees: a hue counts for all bins that are nearer, most for the nearest
RECOGNIZED = 0.7  # what the renders of a toy exceed, and no wrong toy reaches
SATURATION, BRIGHTNESS = 0.55, 60  # of vivid pixels: at least, and of 255
LEAST = 0.01  # share of all pixels that is vivid where there is a subject
Histogram = NDArray[np.float64]  # (BANDS, HUES), sums to 1; zeros without a subject


def identity(picture: Image.Image, references: Sequence[Image.Image]) -> float:
    """The score of a picture; 1 for a reference itself, 0 without a vivid subject.

    >>> red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    >>> identity(red, [red, blue]), identity(blue, [red])
    (1.0, 0.0)
    """
    own = histogram(picture)
    return max(float(np.minimum(own, histogram(each)).sum()) for each in references)


def histogram(picture: Image.Image) -> Histogram:
    """Shares of hues by height. Neighbouring hues overlap: orange in another light is still nearly orange."""
    pixels = _small(picture)
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
    """(n, HUES) shares of (n,) degrees."""
    apart = np.abs((hues[:, None] - np.arange(HUES) * 360 / HUES + 180) % 360 - 180)
    near = np.maximum(0, 1 - apart / NEAR)
    shares: NDArray[np.float64] = near / near.sum(1, keepdims=True)
    return shares


def _small(picture: Image.Image) -> NDArray[np.float64]:
    scale = SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    small = picture if picture.size == size else picture.resize(size, Image.Resampling.BOX)
    return np.asarray(small.convert("RGB"), np.float64)


def _hues(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) degrees in [0, 360) of (n, 3) pixels."""
    r, g, b = pixels.T
    degrees: NDArray[np.float64] = np.rad2deg(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)) % 360
    return degrees
