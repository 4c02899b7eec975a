"""The training images on disk: rendered once, in chunks, and reused after an interruption."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scripts.tiny_scenes.render import SIDE, render
from scripts.tiny_scenes.scene import Scene, scenes

CHUNK = 1000  # images per file
SEED = 1


def training_scenes(count: int) -> list[Scene]:
    """Return the scenes of the training images, in order and without held-out combinations."""
    return list(islice(scenes(SEED), count))


def prepare(folder: Path, count: int, workers: int) -> Iterator[int]:
    """Render missing images and yield the number of finished images after each chunk."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = training_scenes(count)
    with Pool(workers) as pool:
        for start in range(0, count, CHUNK):
            path, some = folder / f"pictures-{start:06d}.npy", everything[start : start + CHUNK]
            if not path.exists() or len(np.load(path, mmap_mode="r")) < len(some):
                _save(path, np.stack(pool.map(render, some, chunksize=25)))
            yield min(start + CHUNK, count)


def load(folder: Path, count: int) -> NDArray[np.uint8]:
    """Return the images, (count, 64, 64, 3), or fewer if the rest is not rendered yet."""
    chunks = [np.load(path) for path in sorted(folder.glob("pictures-*.npy"))]
    return np.concatenate(chunks)[:count] if chunks else np.empty((0, SIDE, SIDE, 3), np.uint8)


def _save(path: Path, chunk: NDArray[np.uint8]) -> None:
    """Write to a temporary file and rename it, so that a chunk is never incomplete."""
    part = path.with_suffix(".part")
    with part.open("wb") as stream:
        np.save(stream, chunk)
    part.rename(path)
