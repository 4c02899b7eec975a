"""The weighted sum of adapters as an adapter: its factors beside each other, the weights folded in."""

from __future__ import annotations

from collections.abc import Sequence

from krona_hub.adapter import Adapter


def weighted_sum(adapters: Sequence[tuple[Adapter, float]], *, allow_base_mismatch: bool = False) -> Adapter:
    """Σ weight · adapter, exactly, with the union of their layers."""
    raise NotImplementedError
