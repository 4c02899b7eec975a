"""Metrics of a run, one JSON object per line, so that a crash loses at most the last line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from krona_hub.checkpoints.atomic import atomic_text
from krona_hub.checkpoints.os_errors import fault
from krona_hub.errors import NoDeviceError, UsageError
from krona_hub.training.settings import TrainingSettings

FILE = "metrics.jsonl"  # in the run folder
SMOOTH = 0.95  # weight of the past in the smoothed loss


FOLDER, GRID = "samples", "grid.png"  # in the run folder


AUTO, NONE = "auto", "none"
PACKAGES: Mapping[str, tuple[str, ...]] = {  # tracker -> packages, any of which provides it
    "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",),
}  # fmt: skip


class Metrics:
    """Appends to the metrics file of a run. A line is written when `add` returns."""

    def __init__(self, run: Path) -> None:
        self.path = run / FILE

    def add(self, step: int, **values: Any) -> None:
        """Append the metrics of a step."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise fault(error, self.path) from error

    def cut(self, step: int) -> None:
        """Delete the metrics after a step, because a resumed run measures them again."""
        kept = [row for row in read_metrics(self.path.parent) if row["step"] <= step]
        atomic_text(self.path, "".join(json.dumps(row) + "\n" for row in kept), overwrite=True)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return all complete lines. A last line that a crash truncated is skipped."""
    path, rows = run / FILE, []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def series(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return the (step, value) pairs of a metric.

    >>> series([{"step": 1, "loss": 0.5}, {"step": 1, "validation_loss": 0.7}], "loss")
    [(1, 0.5)]
    """
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]


def smoothed(last: float | None, value: float) -> float:
    """Return the exponential moving average after one more value."""
    return value if last is None else SMOOTH * last + (1 - SMOOTH) * value


def sample_files(run: Path) -> dict[int, list[Path]]:
    """Return the sample images by step, in the order of the prompts."""
    found: dict[int, list[Path]] = {}
    for path in sorted((run / FOLDER).glob("step-*-*.png")):
        found.setdefault(int(path.stem.split("-")[1]), []).append(path)
    return found


def trackers_of(settings: TrainingSettings) -> tuple[str, ...]:
    """Return the active trackers.

    Raises UsageError for an unknown tracker, and NoDeviceError if its package is not installed.
    """
    named = tuple(name for name in settings.trackers if name not in (AUTO, NONE))
    for name in named:
        _check(name)
    automatic = AUTO in settings.trackers and "tensorboard" not in named and _installed("tensorboard")
    return (*named, "tensorboard") if automatic else named


def _check(name: str) -> None:
    if name not in PACKAGES:
        near = get_close_matches(name, PACKAGES, n=1)
        fix = f"Did you mean {near[0]!r}?" if near else f"Choose one of: {', '.join([*PACKAGES, AUTO, NONE])}."
        raise UsageError(f"Unknown tracker {name!r}.", fix=fix)
    if not _installed(name):
        raise NoDeviceError(f"Tracker {name} is not installed.", fix=f"Run pip install {PACKAGES[name][0]}.")


def _installed(name: str) -> bool:
    return any(find_spec(package) is not None for package in PACKAGES[name])
