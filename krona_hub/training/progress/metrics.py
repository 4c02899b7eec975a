"""What a training measures, one JSON object per line: it survives a crash, and a resumed run goes on from it."""

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
SMOOTH = 0.95  # share of the past in the smoothed loss


FOLDER, GRID = "samples", "grid.png"  # in the run folder


AUTO, NONE = "auto", "none"
PACKAGES: Mapping[str, tuple[str, ...]] = {  # tracker -> packages, one of which it needs
    "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",),
}  # fmt: skip


class Metrics:
    """Appends to the run's file; a line is written when `add` returns."""

    def __init__(self, run: Path) -> None:
        self.path = run / FILE

    def add(self, step: int, **values: Any) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise fault(error, self.path) from error

    def cut(self, step: int) -> None:
        """Forget what lies behind a step: a resumed run measures it again."""
        kept = [row for row in read_metrics(self.path.parent) if row["step"] <= step]
        atomic_text(self.path, "".join(json.dumps(row) + "\n" for row in kept), overwrite=True)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Every whole line; a last one that a crash cut short is left out."""
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
    """(step, value) of a measure.

    >>> series([{"step": 1, "loss": 0.5}, {"step": 1, "validation_loss": 0.7}], "loss")
    [(1, 0.5)]
    """
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]


def smoothed(last: float | None, value: float) -> float:
    """The exponential mean after one more value."""
    return value if last is None else SMOOTH * last + (1 - SMOOTH) * value


def sample_files(run: Path) -> dict[int, list[Path]]:
    """Step -> the pictures of its samples, in the order of the prompts."""
    found: dict[int, list[Path]] = {}
    for path in sorted((run / FOLDER).glob("step-*-*.png")):
        found.setdefault(int(path.stem.split("-")[1]), []).append(path)
    return found


def trackers_of(settings: TrainingSettings) -> tuple[str, ...]:
    """The trackers that are told. Raises UsageError for an unknown name, NoDeviceError without its package."""
    named = tuple(name for name in settings.trackers if name not in (AUTO, NONE))
    for name in named:
        _check(name)
    automatic = AUTO in settings.trackers and "tensorboard" not in named and _installed("tensorboard")
    return (*named, "tensorboard") if automatic else named


def _check(name: str) -> None:
    if name not in PACKAGES:
        near = get_close_matches(name, PACKAGES, n=1)
        fix = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(PACKAGES)}, {AUTO} and {NONE}."
        raise UsageError(f"there is no tracker {name!r}.", fix=fix)
    if not _installed(name):
        raise NoDeviceError(f"the tracker {name} is not installed.", fix=f"pip install {PACKAGES[name][0]}.")


def _installed(name: str) -> bool:
    return any(find_spec(package) is not None for package in PACKAGES[name])
