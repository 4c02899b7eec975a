"""The request of `merge` as a value. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from krona_hub.merging.output.write_model import MergeDestination
from krona_hub.merging.plan import MergePlan

Mode = Literal["nearest", "stochastic"]


@dataclass(frozen=True, eq=False)
class MergeRequest:
    """A requested merge: planned, with a valid destination."""

    plan: MergePlan
    destination: MergeDestination
    rounding: Mode
    seed: int
    exact_rounding: bool
    options: Mapping[str, Any]  # recorded: those that differ from their defaults
    hash: bool | None
    title: str | None
    threads: int
