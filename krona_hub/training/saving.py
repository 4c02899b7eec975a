"""A training into a checkpoint, and back to what it was at one."""

from __future__ import annotations

import torch
from accelerate.utils import broadcast

from krona_hub.errors import IntegrityError
from krona_hub.training.progress.checkpoint import load_state, random_states, save_state, set_random_states
from krona_hub.training.progress.training_state import Training


def save(training: Training) -> None:
    """A checkpoint of this step, by the main process."""
    if training.is_main:
        average = training.average.values if training.average is not None else []
        tree = {
            "fingerprint": training.fingerprint,
            "factors": list(training.parameters),
            "optimizer": training.optimizer.state_dict(),
            "average": list(average),
            "scaler": training.precision.state,
            "random": random_states(),
            "smooth_loss": training.smooth_loss,
            "skipped": training.skipped,
        }
        save_state(training.run, training.step, tree, training.settings.keep_checkpoints)
    training.accelerator.wait_for_everyone()


def resume(training: Training) -> None:
    """Set everything to what it was at the newest checkpoint. Raises IntegrityError where the data is another."""
    step, tree = load_state(training.run)
    if tree["fingerprint"] != training.fingerprint:
        raise IntegrityError(
            f"{training.run} was trained with other pictures, captions or settings, or another number of processes.",
            fix="Put them back as they were, or start a new run.",
        )
    with torch.no_grad():
        for parameter, value in zip(training.parameters, tree["factors"], strict=True):
            parameter.copy_(value)
        if training.average is not None:
            for kept, value in zip(training.average.values, tree["average"], strict=True):
                kept.copy_(value)
    training.optimizer.load_state_dict(tree["optimizer"])
    training.step, training.smooth_loss, training.skipped = step, tree["smooth_loss"], tree["skipped"]
    training.precision.restore(tree["scaler"])
    set_random_states(tree["random"])
    if training.is_main:
        training.metrics.cut(step)


def same_everywhere(training: Training) -> None:
    """The factors of the main process, in all: they start equal, unless a process read other numbers."""
    if training.accelerator.num_processes > 1:
        for parameter in training.parameters:
            parameter.data.copy_(broadcast(parameter.data))
