"""Validation and samples: the adapter on its way, seen as it would be handed out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from PIL.Image import Image

from krona_hub.training.model.optimizers import has_own_mode
from krona_hub.training.progress.samples import save_samples
from krona_hub.training.progress.training_state import Training


def due(step: int, every: int) -> bool:
    """Whether a step is one of every so many; 0 for never."""
    return every > 0 and step % every == 0


def run_due_checks(training: Training) -> None:
    """Validation and samples of the adapter as it would be handed out; written by the main process, the others wait."""
    s = training.settings
    with final_weights(training):
        if training.is_main or training.spread:
            if s.validate_every and _now(training, s.validate_every):
                _validated(training)
            if training.sampler is not None and _now(training, s.sample_every):
                _sampled(training, training.sampler)
    training.accelerator.wait_for_everyone()


def _now(training: Training, every: int) -> bool:
    """At the beginning, at the end, and at every so many steps."""
    return training.step in (0, training.settings.steps) or due(training.step, every)


def _validated(training: Training) -> None:
    loss = validate(training)
    if training.is_main:
        training.metrics.add(training.step, validation_loss=loss)
    if training.accelerator.trackers:
        training.accelerator.log({"validation_loss": loss}, step=training.step)


def _sampled(training: Training, draw: Callable[[], list[Image]]) -> None:
    images = draw()
    if training.is_main:
        save_samples(training.run, training.step, images)


def validate(training: Training) -> float:
    """Mean loss of the held-out pictures at fixed noise and times."""
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
    """The factors as the final adapter has them, while the block runs: averaged, where there is an average.

    Afterwards they are what they were, bit by bit: an optimizer that computes its way to the average and back rounds.
    """
    before = [p.detach().clone() for p in training.parameters]
    own_mode = has_own_mode(training.optimizer)
    if own_mode:
        training.optimizer.eval()  # type: ignore[attr-defined]
    if training.average is not None:
        training.average.give()
    try:
        yield
    finally:
        if own_mode:
            training.optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter, value in zip(training.parameters, before, strict=True):
                parameter.copy_(value)
