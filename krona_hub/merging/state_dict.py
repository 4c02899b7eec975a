"""`apply_to_state_dict`: adapters into weights that are already in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from krona_hub.adapter import Adapter
from krona_hub.merging.rounding import NEAREST, Rounding


def apply_to_state_dict(
    state_dict: Mapping[str, Tensor],
    adapters: Adapter | Sequence[tuple[Adapter | str | Path, float]],
    *,
    base: str | Path | None = None,
    component: str | None = None,
    out_dtype: torch.dtype | None = None,
    rounding: Rounding = NEAREST,
    allow_missing: bool = False,
) -> dict[str, Tensor]:
    """A new state dict with w·ΔW of every adapter added; what no adapter touches is shared with the old one."""
    raise NotImplementedError
