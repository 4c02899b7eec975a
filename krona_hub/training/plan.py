"""What a training will do, found out without doing it: data, layers, parameters, memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from krona_hub.bases.base import Base
from krona_hub.errors import UsageError
from krona_hub.training.data.captions import has_alternatives
from krona_hub.training.data.dataset import Data, Example, read_folder, split_held_out
from krona_hub.training.data.images import Size, bucket_sizes, nearest_bucket
from krona_hub.training.model.model_families import ModelFamily, own_resolution, size_multiple
from krona_hub.training.model.optimizers import OPTIMIZERS, check_schedule
from krona_hub.training.model.trained_layers import TrainedLayer
from krona_hub.training.progress.metrics import trackers_of
from krona_hub.training.progress.regularization_images import pictures_there, prior_folder
from krona_hub.training.randomness import permutation
from krona_hub.training.settings import TrainingSettings

FLOAT = 4  # bytes
ADAM = 4  # numbers kept per factor: itself, its gradient, two moments


@dataclass(frozen=True)
class Pictures:
    """What a training sees."""

    train: Data
    validation: tuple[Example, ...]
    prior: tuple[Example, ...]
    resolution: int
    sizes: tuple[Size, ...]  # of the training pictures
    multiple: int  # pixels

    def sizes_of(self, examples: tuple[Example, ...], buckets: bool) -> tuple[Size, ...]:
        return sizes_for(examples, self.resolution, self.multiple, buckets)


@dataclass(frozen=True)
class TrainingPlan:
    """What `krona train --check` prints."""

    base: str
    family: str
    prediction: str
    device: str
    dtype: str  # of the base
    pictures: int
    validation_pictures: int
    prior_pictures: int
    bad_pictures: tuple[str, ...]
    sizes: tuple[tuple[Size, int], ...]  # (width, height) and how many pictures
    layers: int
    forms: tuple[tuple[str, int], ...]  # "64x4 ⊗ 5x80" and how many layers
    parameters: int
    steps: int
    processes: int
    pictures_per_step: int
    epochs: float
    memory: int  # bytes, estimated: weights, factors, their optimizer; without activations
    seconds_per_step: float | None = None  # measured by steps that are thrown away, where that was asked for
    peak_memory: int | None = None  # bytes, in these steps: of the GPU, or of the whole process

    @property
    def seconds(self) -> float | None:
        return None if self.seconds_per_step is None else self.seconds_per_step * self.steps


def read_pictures(pipe: Any, family: ModelFamily, settings: TrainingSettings) -> Pictures:
    """All that is read from the disk; raises DataError with every bad file."""
    if not settings.data:
        raise UsageError("no pictures were given.", fix="Give --data FOLDER.")
    data = read_folder(settings.data, settings.prompt or settings.trigger_word, skip_bad=settings.skip_bad)
    validation: tuple[Example, ...] = ()
    if settings.held_out:
        data, validation = split_held_out(data, settings.held_out, lambda n: permutation(n, settings.seed, "held out"))
    if settings.validation_data:
        validation += read_folder(settings.validation_data, settings.prompt, skip_bad=settings.skip_bad).examples
    resolution, multiple = _resolution(pipe, family, settings)
    sizes = sizes_for(data.examples, resolution, multiple, settings.buckets)
    return Pictures(data, validation, _prior(settings), resolution, sizes, multiple)


def _resolution(pipe: Any, family: ModelFamily, settings: TrainingSettings) -> tuple[int, int]:
    """In pixels, and what sides are multiples of. Raises UsageError for too few."""
    resolution, multiple = settings.resolution or own_resolution(pipe, family), size_multiple(pipe, family)
    if resolution < multiple:
        raise UsageError(
            f"{resolution} pixels are too few for this base.", fix=f"Give --resolution {multiple} or more."
        )
    return resolution, multiple


def square_side(pipe: Any, family: ModelFamily, settings: TrainingSettings) -> int:
    """Pixels of a square picture of the training's resolution."""
    resolution, multiple = _resolution(pipe, family, settings)
    return resolution // multiple * multiple


def _prior(settings: TrainingSettings) -> tuple[Example, ...]:
    """Pictures of the class that are there; those that will be drawn are not, before a training."""
    folder = prior_folder(settings)
    if folder is None or (settings.prior_pictures and not pictures_there(settings)):
        return ()
    caption = "" if has_alternatives(settings.prior_prompt) else settings.prior_prompt
    return read_folder(folder, caption, skip_bad=settings.skip_bad).examples


def sizes_for(examples: tuple[Example, ...], resolution: int, multiple: int, buckets: bool) -> tuple[Size, ...]:
    """The size that each picture is trained at."""
    possible = bucket_sizes(resolution, multiple)
    side = resolution // multiple * multiple
    return tuple(nearest_bucket(e.size, possible) if buckets else (side, side) for e in examples)


def check_settings(settings: TrainingSettings) -> None:
    """What can be wrong before anything is opened."""
    check_schedule(settings.schedule)
    trackers_of(settings)
    if settings.optimizer not in OPTIMIZERS:
        from krona_hub.training.model.optimizers import make_optimizer

        make_optimizer([], settings)
    if settings.sample_every and not settings.sample_prompts and not settings.prompt:
        raise UsageError("samples need prompts.", fix='Give --sample-prompts "a photo of sks toy on a table".')
    if settings.validate_every and not (settings.held_out or settings.validation_data):
        raise UsageError("the validation needs pictures.", fix="Give --held-out N, or --validation-data FOLDER.")


def memory_of(base: Base, pipe: Any, targets: tuple[TrainedLayer, ...], settings: TrainingSettings) -> int:
    """Bytes of weights, factors, gradients and Adam's moments; activations come on top and depend on the size."""
    denoiser = getattr(pipe, base.denoiser or "unet")
    weights = sum(p.numel() * p.element_size() for p in denoiser.parameters())
    if not settings.cache:
        others = [m for m in pipe.components.values() if hasattr(m, "parameters") and m is not denoiser]
        weights += sum(p.numel() * p.element_size() for m in others for p in m.parameters())
    copies = ADAM + (1 if settings.ema else 0)
    return int(weights + FLOAT * copies * sum(t.parameters for t in targets))


def forms_of(targets: tuple[TrainedLayer, ...]) -> tuple[tuple[str, int], ...]:
    """Form -> layers, most layers first."""
    counts: dict[str, int] = {}
    for t in targets:
        terms = f"{t.terms} terms of " if t.terms > 1 else ""
        rank = f", B r{t.rank}" if t.rank is not None else ""
        form = f"{terms}{t.shape}{rank}"
        counts[form] = counts.get(form, 0) + 1
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def counted(sizes: tuple[Size, ...]) -> tuple[tuple[Size, int], ...]:
    return tuple((size, sizes.count(size)) for size in sorted(set(sizes), key=lambda s: (prod(s), s)))
