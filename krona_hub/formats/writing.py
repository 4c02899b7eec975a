"""Adapter → file: names, tensors and metadata of the target, whole or not at all, and read back before it counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from krona_hub.adapter import Adapter


@dataclass(frozen=True)
class WriteReport:
    """What was written, and what reading it back showed."""

    path: Path  # the file, or the folder of a PEFT adapter
    format: str  # a name of FORMATS
    files: tuple[Path, ...]
    modules: int  # in the file; fused projections count once
    parameters: int  # alpha not counted
    bytes: int
    worst_difference: float  # relative, Frobenius, over all layers: what was read back against what was meant
    layers: int = 0  # rebuilt and compared
    notes: tuple[str, ...] = ()  # what the target could not hold, and what a reader of the file must know

    def __str__(self) -> str:
        worst = f"worst relative difference {self.worst_difference:.0e}"
        return f"checked: {self.layers}/{self.layers} modules rebuilt, {worst}"


def write(
    adapter: Adapter,
    path: str | Path,
    *,
    format: str = "krona",
    base: str | Path | None = None,
    tool: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    split_qkv: bool = False,
) -> WriteReport:
    """Write `adapter` in `format`, with the names that `tool` knows, and check the file by reading it back."""
    raise NotImplementedError
