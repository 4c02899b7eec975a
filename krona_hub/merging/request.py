"""What `merge` is asked for, as a value. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from krona_hub.merging.output.write_model import MergeDestination
from krona_hub.merging.plan import MergePlan

Mode = Literal["nearest", "stochastic"]


@dataclass(frozen=True, eq=False)
class MergeRequest:
    """A merge that can be: planned, with a place for its output."""

    plan: MergePlan
    place: MergeDestination
    rounding: Mode
    seed: int
    exact_rounding: bool
    options: Mapping[str, Any]  # for the record: those that differ from their defaults
    hash: bool | None
    title: str | None
    threads: int
