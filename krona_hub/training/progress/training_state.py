"""The state of a run: everything that a step reads or changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from PIL.Image import Image
from torch import Tensor
from torch.optim import Optimizer

from krona_hub.layers.adapter_branch import Branch
from krona_hub.layers.parameter_vectors import VectorBranch
from krona_hub.training.data.batches import Batches
from krona_hub.training.data.encoding import Source
from krona_hub.training.model.objective import Objective
from krona_hub.training.model.optimizers import Average
from krona_hub.training.model.precision import MixedPrecision
from krona_hub.training.progress.metrics import Metrics
from krona_hub.training.settings import TrainingSettings


@dataclass(frozen=True)
class StepReport:
    """Progress after a training step."""

    step: int  # completed steps
    steps: int
    loss: float
    smooth_loss: float
    seconds: float  # of the last step
    memory: int  # peak bytes of the GPU, or of the process


@dataclass
class Training:
    """A run in progress."""

    settings: TrainingSettings
    run: Path
    accelerator: Accelerator
    precision: MixedPrecision
    objective: Objective
    source: Source
    batches: Batches
    branches: list[Branch | VectorBranch]  # of the adapter, in all models of the pipeline; vectors are not trained
    parameters: list[Tensor]  # trainable parameters of the branches
    optimizer: Optimizer
    metrics: Metrics
    fingerprint: str  # of settings and data, compared with that of a checkpoint
    validation: Source | None = None
    prior: tuple[Source, Batches] | None = None
    average: Average | None = None
    step: int = 0  # completed steps
    smooth_loss: float | None = None
    skipped: int = 0  # batches whose loss was NaN or infinite
    sampler: Callable[[], list[Image]] | None = None  # generates the samples
    spread: bool = False  # the denoiser is sharded: all processes must take part in every call
    on_step: Callable[[StepReport], None] = field(default=lambda _report: None)

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)
