"""Validation and samples: the adapter on its way, seen as it would be handed out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from krona_hub.training.optimisers import has_own_mode
from krona_hub.training.training import Training


def due(step: int, every: int) -> bool:
    """Whether a step is one of every so many; 0 for never."""
    return every > 0 and step % every == 0


def watch(training: Training) -> None:
    """Validation and samples of the adapter as it would be handed out; by the main process, the others wait."""
    s, step, last = training.settings, training.step, training.step == training.settings.steps
    with as_handed_out(training):
        if training.is_main and s.validate_every and (last or step == 0 or due(step, s.validate_every)):
            training.metrics.add(step, validation_loss=validate(training))
        wanted = s.sample_every and (last or step == 0 or due(step, s.sample_every))
        if training.is_main and wanted and training.sample is not None:
            training.sample(step)
    training.accelerator.wait_for_everyone()


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
def as_handed_out(training: Training) -> Iterator[None]:
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
