"""The samples that lie in a run folder. Torch-free: reports and repositories are made of them without a model."""

from __future__ import annotations

from pathlib import Path

FOLDER, GRID = "samples", "grid.png"  # in the run folder


def sample_files(run: Path) -> dict[int, list[Path]]:
    """Step -> the pictures of its samples, in the order of the prompts."""
    found: dict[int, list[Path]] = {}
    for path in sorted((run / FOLDER).glob("step-*-*.png")):
        found.setdefault(int(path.stem.split("-")[1]), []).append(path)
    return found
