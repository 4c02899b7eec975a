"""Validation and samples during training, with the weights that the final adapter would have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from PIL.Image import Image

from krona_hub.training.model.optimizers import has_own_mode
from krona_hub.training.progress.samples import save_samples
from krona_hub.training.progress.training_state import Training


def due(step: int, every: int) -> bool:
    """Return whether a step is a multiple of `every`; 0 means never."""
    return every > 0 and step % every == 0


def run_due_checks(training: Training) -> None:
    """Validate and sample with the final weights. The main process writes the results; the others wait."""
    s = training.settings
    with final_weights(training):
        if training.is_main or training.spread:
            if s.validate_every and _is_due(training, s.validate_every):
                _record_validation(training)
            if training.sampler is not None and _is_due(training, s.sample_every):
                _record_samples(training, training.sampler)
    training.accelerator.wait_for_everyone()


def _is_due(training: Training, every: int) -> bool:
    """Return whether this is the first step, the last step, or a multiple of `every`."""
    return training.step in (0, training.settings.steps) or due(training.step, every)


def _record_validation(training: Training) -> None:
    loss = validate(training)
    if training.is_main:
        training.metrics.add(training.step, validation_loss=loss)
    if training.accelerator.trackers:
        training.accelerator.log({"validation_loss": loss}, step=training.step)


def _record_samples(training: Training, generate: Callable[[], list[Image]]) -> None:
    images = generate()
    if training.is_main:
        save_samples(training.run, training.step, images)


def validate(training: Training) -> float:
    """Return the mean loss of the validation images at fixed noise and times."""
    source = training.validation
    if source is None:
        return float("nan")
    seed, losses = training.settings.seed, []
    for i in range(len(source.examples)):
        latents, given = source.fixed(i, seed)
        losses.append(training.objective.validation_loss(latents, given, i))
    return sum(losses) / len(losses)


@contextmanager
def final_weights(training: Training) -> Iterator[None]:
    """Use the weights of the final adapter within the block: the moving average, if there is one.

    The previous weights are restored from a copy, because schedule-free optimizers round when they switch modes.
    """
    before = [p.detach().clone() for p in training.parameters]
    own_mode = has_own_mode(training.optimizer)
    if own_mode:
        training.optimizer.eval()  # type: ignore[attr-defined]
    if training.average is not None:
        training.average.apply()
    try:
        yield
    finally:
        if own_mode:
            training.optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter, value in zip(training.parameters, before, strict=True):
                parameter.copy_(value)
