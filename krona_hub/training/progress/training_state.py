"""A training in progress, as a value: what a step reads and what it moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from PIL.Image import Image
from torch import Tensor
from torch.optim import Optimizer

from krona_hub.layers.adapter_branch import Branch
from krona_hub.training.data.batches import Batches
from krona_hub.training.data.encoding import Source
from krona_hub.training.model.objective import Objective
from krona_hub.training.model.optimizers import Average
from krona_hub.training.model.precision import MixedPrecision
from krona_hub.training.progress.metrics import Metrics
from krona_hub.training.settings import TrainingSettings


@dataclass(frozen=True)
class StepReport:
    """What a person sees while it runs."""

    step: int  # that are done
    steps: int
    loss: float
    smooth_loss: float
    seconds: float  # of the last step
    memory: int  # bytes: the most that the device, or the process, has held


@dataclass
class Training:
    """A training in progress."""

    settings: TrainingSettings
    run: Path
    accelerator: Accelerator
    precision: MixedPrecision
    objective: Objective
    source: Source
    batches: Batches
    branches: list[Branch]  # of the adapter, all over the pipeline
    parameters: list[Tensor]  # theirs, that are trained
    optimizer: Optimizer
    metrics: Metrics
    fingerprint: str  # of settings and data: what a checkpoint must have been made with
    validation: Source | None = None
    prior: tuple[Source, Batches] | None = None
    average: Average | None = None
    step: int = 0  # steps that are done
    smooth_loss: float | None = None
    skipped: int = 0  # batches whose loss was no number
    sampler: Callable[[], list[Image]] | None = None  # draws the samples
    spread: bool = False  # the denoiser is in pieces: every process must take part where it is called
    tell: Callable[[StepReport], None] = field(default=lambda _progress: None)

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)
