"""The state of an interrupted calibration: sums of moments in a file beside the output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from krona_hub.checkpoints.header import read_header
from krona_hub.checkpoints.reader import load
from krona_hub.checkpoints.writer import write_tensors
from krona_hub.errors import KronaError

RECORD, DONE = "krona.calibration", "krona.done"  # keys of the metadata
ENDING = ".partial"


class PartialSums(NamedTuple):
    """The sums of the trajectories so far."""

    state: dict[str, Tensor]
    done: int  # trajectories


def partial_path(out: Path) -> Path:
    """Return the path of the state for an output."""
    return out.with_name(out.name + ENDING)


def write_partial(path: Path, state: Mapping[str, Tensor], record: Mapping[str, Any], done: int) -> None:
    """Replace the state atomically."""
    write_tensors(path, state, {RECORD: _text(record), DONE: str(done)}, overwrite=True)


def read_partial(path: Path, record: Mapping[str, Any]) -> PartialSums | None:
    """Return the state; None if there is none, or if it is damaged or of another calibration."""
    if not path.is_file():
        return None
    try:
        header = read_header(path)
        if header.metadata.get(RECORD) != _text(record):
            return None
        return PartialSums({n: t.clone() for n, t in load(header).items()}, int(header.metadata[DONE]))
    except (KronaError, KeyError, ValueError):
        return None


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, sort_keys=True)
