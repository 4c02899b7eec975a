"""How moments were gathered. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CalibrationReport:
    """How moments were gathered."""

    layers: int
    samples: int  # calls of the denoiser
    prompts: tuple[str, ...]
    other_prompts: tuple[str, ...]
    seed: int
    steps: int | None  # of a trajectory
    guidance: float | None
    other_change: float | None  # E‖source − base‖² on other prompts, relative to that on prompts with the subject
    nbytes: int  # of the moments
    seconds: float
    warnings: tuple[str, ...] = ()
    out: Path | None = None  # the file of the moments
