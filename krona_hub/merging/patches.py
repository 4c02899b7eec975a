"""What is added to a stored tensor: one layer's delta, its strength, and where the layer lies in the tensor."""

from __future__ import annotations

from dataclasses import dataclass

from krona_hub.adapter import LayerDelta
from krona_hub.bases.base import Placement


@dataclass(frozen=True, eq=False)
class Patch:
    """One adapter's layer on a stored tensor: stored rows `placement.rows` get weight · ΔW."""

    delta: LayerDelta
    weight: float  # strength, any sign; 0 leaves the rows as they are
    placement: Placement
