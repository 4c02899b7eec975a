"""What a training measures, one JSON object per line: it survives a crash, and a resumed run goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from krona_hub.checkpoints.atomic import atomic_text
from krona_hub.checkpoints.os_errors import fault

FILE = "metrics.jsonl"  # in the run folder
SMOOTH = 0.95  # share of the past in the smoothed loss


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
