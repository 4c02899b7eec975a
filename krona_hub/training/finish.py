"""End a training run: write the adapter, its companion exports and the HTML report, and return a summary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from krona_hub.adapters.adapter import Adapter
from krona_hub.bases.base import Base
from krona_hub.formats.writing.writer import write
from krona_hub.training.html_report import write_report
from krona_hub.training.loop import memory_used
from krona_hub.training.progress.metrics import read_metrics, series
from krona_hub.training.progress.training_state import Training
from krona_hub.training.progress.validation import final_weights
from krona_hub.training.settings import TrainingSettings
from krona_hub.training.setup import Session
from krona_hub.training.training_record import trained_adapter

ADAPTER = "adapter.safetensors"  # in the run folder


@dataclass(frozen=True)
class TrainingReport:
    """Outputs and losses of a training run."""

    run: Path
    adapter: Path
    exports: tuple[Path, ...]
    steps: int
    layers: int
    parameters: int
    first_loss: float | None  # smoothed
    last_loss: float | None  # smoothed
    validation: tuple[tuple[int, float], ...]  # (step, loss)
    skipped: int  # batches whose loss was NaN or infinite
    memory: int  # peak bytes


def finished(training: Training, session: Session) -> TrainingReport:
    """Write the adapter, its companion exports and the HTML report; close the trackers."""
    settings, run = training.settings, training.run
    adapter_file = run / ADAPTER
    exports: tuple[Path, ...] = ()
    with final_weights(training):
        adapter = trained_adapter(session.pipe, session.base, settings, session.facts)
    rows = read_metrics(run)
    smooth = series(rows, "smooth_loss")
    if training.is_main:
        write(adapter, adapter_file, overwrite=True, base=session.base)
        exports = tuple(_export(adapter, settings, name, session.base) for name in settings.export)
        write_report(run, adapter_file)
    report = TrainingReport(
        run, adapter_file, exports, training.step, len(adapter.layers), adapter.parameters,
        smooth[0][1] if smooth else None, smooth[-1][1] if smooth else None,
        tuple(series(rows, "validation_loss")), training.skipped, memory_used(training),
    )  # fmt: skip
    training.accelerator.wait_for_everyone()
    if training.accelerator.trackers:
        training.accelerator.end_training()
    return report


NAMES = {"lora": "kohya-lora", "lycoris": "lycoris-lokr", "lokr": "lycoris-lokr"}


def _export(adapter: Adapter, settings: TrainingSettings, name: str, base: Base) -> Path:
    """Write the adapter in another format next to the native file."""
    run = Path(settings.output)
    path = run / f"adapter.{name}.safetensors"
    if name == "lora":
        from krona_hub.conversion import convert

        convert(run / ADAPTER, path, to="lora", exact=True, base=settings.base, overwrite=True)
    else:
        write(adapter, path, format=NAMES.get(name, name), base=base, overwrite=True)
    return path
