"""Plan a training run without starting it: images, layers, parameters and memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from krona_hub.bases.base import Base
from krona_hub.errors import UsageError
from krona_hub.pipelines.randomness import permutation
from krona_hub.training.data.captions import has_alternatives
from krona_hub.training.data.dataset import Data, Example, read_folder, split_held_out
from krona_hub.training.data.images import Size, bucket_sizes, nearest_bucket
from krona_hub.training.model.model_families import ModelFamily, own_resolution, size_multiple
from krona_hub.training.model.optimizers import OPTIMIZERS, check_schedule
from krona_hub.training.model.trained_layers import TrainedLayer
from krona_hub.training.progress.metrics import trackers_of
from krona_hub.training.progress.regularization_images import image_count, prior_folder
from krona_hub.training.settings import TrainingSettings

FLOAT = 4  # bytes
ADAM = 4  # values per factor element: itself, its gradient and two moments


@dataclass(frozen=True)
class TrainingImages:
    """The training, validation and regularization images of a run."""

    train: Data
    validation: tuple[Example, ...]
    prior: tuple[Example, ...]
    resolution: int
    sizes: tuple[Size, ...]  # of the training images
    multiple: int  # pixels

    def sizes_of(self, examples: tuple[Example, ...], buckets: bool) -> tuple[Size, ...]:
        return sizes_for(examples, self.resolution, self.multiple, buckets)


@dataclass(frozen=True)
class TrainingPlan:
    """Result of `check_training`, printed by `krona train --check`."""

    base: str
    family: str
    prediction: str
    device: str
    dtype: str  # of the base model
    pictures: int
    validation_pictures: int
    prior_pictures: int
    bad_pictures: tuple[str, ...]
    sizes: tuple[tuple[Size, int], ...]  # (width, height) and number of images
    layers: int
    forms: tuple[tuple[str, int], ...]  # factorization, such as "64x4 ⊗ 5x80", and number of layers
    parameters: int
    steps: int
    processes: int
    pictures_per_step: int
    epochs: float
    memory: int  # estimated bytes of weights, factors and optimizer, without activations
    seconds_per_step: float | None = None  # measured on trial steps, if requested
    peak_memory: int | None = None  # bytes of the GPU or of the process during the trial steps

    @property
    def seconds(self) -> float | None:
        """Estimated duration of all steps, if it was measured."""
        return None if self.seconds_per_step is None else self.seconds_per_step * self.steps


def read_images(pipe: Any, family: ModelFamily, settings: TrainingSettings) -> TrainingImages:
    """Read all images and captions. Raises DataError that lists the unusable files."""
    if not settings.data:
        raise UsageError("Missing option --data.", fix="Specify a folder of images with --data FOLDER.")
    data = read_folder(settings.data, settings.prompt or settings.trigger_word, skip_bad=settings.skip_bad)
    validation: tuple[Example, ...] = ()
    if settings.held_out:
        data, validation = split_held_out(data, settings.held_out, lambda n: permutation(n, settings.seed, "held out"))
    if settings.validation_data:
        validation += read_folder(settings.validation_data, settings.prompt, skip_bad=settings.skip_bad).examples
    resolution, multiple = _resolution(pipe, family, settings)
    sizes = sizes_for(data.examples, resolution, multiple, settings.buckets)
    return TrainingImages(data, validation, _prior(settings), resolution, sizes, multiple)


def _resolution(pipe: Any, family: ModelFamily, settings: TrainingSettings) -> tuple[int, int]:
    """Return the resolution and the multiple of all image sides, in pixels. Raises UsageError if it is too small."""
    resolution, multiple = settings.resolution or own_resolution(pipe, family), size_multiple(pipe, family)
    if resolution < multiple:
        raise UsageError(
            f"Resolution {resolution} is too small for this base model.", fix=f"Use --resolution {multiple} or more."
        )
    return resolution, multiple


def square_side(pipe: Any, family: ModelFamily, settings: TrainingSettings) -> int:
    """Return the side, in pixels, of a square image at the training resolution."""
    resolution, multiple = _resolution(pipe, family, settings)
    return resolution // multiple * multiple


def _prior(settings: TrainingSettings) -> tuple[Example, ...]:
    """Read existing regularization images. Those that a run will generate do not exist before it."""
    folder = prior_folder(settings)
    if folder is None or (settings.prior_pictures and not image_count(settings)):
        return ()
    caption = "" if has_alternatives(settings.prior_prompt) else settings.prior_prompt
    return read_folder(folder, caption, skip_bad=settings.skip_bad).examples


def sizes_for(examples: tuple[Example, ...], resolution: int, multiple: int, buckets: bool) -> tuple[Size, ...]:
    """Return the size at which each image is trained."""
    possible = bucket_sizes(resolution, multiple)
    side = resolution // multiple * multiple
    return tuple(nearest_bucket(e.size, possible) if buckets else (side, side) for e in examples)


def check_settings(settings: TrainingSettings) -> None:
    """Check the settings that need neither the base model nor the images."""
    check_schedule(settings.schedule)
    trackers_of(settings)
    if settings.optimizer not in OPTIMIZERS:
        from krona_hub.training.model.optimizers import make_optimizer

        make_optimizer([], settings)
    if settings.sample_every and not settings.sample_prompts and not settings.prompt:
        raise UsageError(
            "--sample-every requires prompts.", fix='Add --sample-prompts "a photo of sks toy on a table".'
        )
    if settings.validate_every and not (settings.held_out or settings.validation_data):
        raise UsageError(
            "--validate-every requires validation images.", fix="Add --held-out N or --validation-data FOLDER."
        )


def memory_of(base: Base, pipe: Any, targets: tuple[TrainedLayer, ...], settings: TrainingSettings) -> int:
    """Estimate the bytes of weights, factors, gradients and Adam moments, without activations."""
    denoiser = getattr(pipe, base.denoiser or "unet")
    weights = sum(p.numel() * p.element_size() for p in denoiser.parameters())
    if not settings.cache:
        others = [m for m in pipe.components.values() if hasattr(m, "parameters") and m is not denoiser]
        weights += sum(p.numel() * p.element_size() for m in others for p in m.parameters())
    copies = ADAM + (1 if settings.ema else 0)
    return int(weights + FLOAT * copies * sum(t.parameters for t in targets))


def factorization_counts(targets: tuple[TrainedLayer, ...]) -> tuple[tuple[str, int], ...]:
    """Count the layers of each factorization, most frequent first."""
    counts: dict[str, int] = {}
    for t in targets:
        terms = f"{t.terms} terms of " if t.terms > 1 else ""
        rank = f", B r{t.rank}" if t.rank is not None else ""
        factorization = f"{terms}{t.shape}{rank}"
        counts[factorization] = counts.get(factorization, 0) + 1
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def size_counts(sizes: tuple[Size, ...]) -> tuple[tuple[Size, int], ...]:
    """Count the images of each size, smallest first."""
    return tuple((size, sizes.count(size)) for size in sorted(set(sizes), key=lambda s: (prod(s), s)))
