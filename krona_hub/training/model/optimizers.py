"""Optimizers by name, learning rate schedules, and the moving average of the factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from math import cos, pi
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from krona_hub.errors import NoDeviceError, UsageError
from krona_hub.training.settings import TrainingSettings


class OptimizerSpec(NamedTuple):
    """The class of an optimizer, the package that provides it, and its arguments."""

    module: str
    class_name: str
    package: str | None  # None if torch provides it
    arguments: Callable[[TrainingSettings], Mapping[str, Any]]


def _adam(s: TrainingSettings) -> dict[str, Any]:
    return {"lr": s.learning_rate, "betas": (s.beta1, s.beta2), "weight_decay": s.weight_decay, "eps": s.epsilon}


def _prodigy(s: TrainingSettings) -> dict[str, Any]:
    return {**_adam(s), "safeguard_warmup": s.warmup > 0, "use_bias_correction": True}


OPTIMIZERS: Mapping[str, OptimizerSpec] = {
    "adamw": OptimizerSpec("torch.optim", "AdamW", None, _adam),
    "adamw-8bit": OptimizerSpec("bitsandbytes.optim", "AdamW8bit", "bitsandbytes", _adam),
    "prodigy": OptimizerSpec("prodigyopt", "Prodigy", "prodigyopt", _prodigy),
    "schedule-free": OptimizerSpec(
        "schedulefree", "AdamWScheduleFree", "schedulefree", _adam
    ),  # `rate_at` applies the warm-up
}
SCHEDULES: Mapping[str, Callable[[float], float]] = {  # fraction of completed steps -> factor of the learning rate
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + cos(pi * done)) / 2,
}


def make_optimizer(parameters: Sequence[Tensor], settings: TrainingSettings) -> Optimizer:
    """Create the optimizer of the settings.

    Raises UsageError for an unknown name, and NoDeviceError if its package is not installed.
    """
    kind = OPTIMIZERS.get(settings.optimizer)
    if kind is None:
        near = get_close_matches(settings.optimizer, OPTIMIZERS, n=1)
        fix = f"Did you mean {near[0]!r}?" if near else f"Choose one of: {', '.join(OPTIMIZERS)}."
        raise UsageError(f"Unknown optimizer {settings.optimizer!r}.", fix=fix)
    try:
        optimizer: Optimizer = getattr(import_module(kind.module), kind.class_name)(
            parameters, **kind.arguments(settings)
        )
    except ImportError as error:
        raise NoDeviceError(
            f"Optimizer {settings.optimizer} requires the package {kind.package}, which is not installed.",
            fix=f"Run pip install {kind.package}, or use --optimizer adamw.",
        ) from error
    return optimizer


def rate_at(step: int, settings: TrainingSettings) -> float:
    """Return the learning rate of a step, counted from 0: a linear warm-up, then the schedule.

    >>> s = TrainingSettings(steps=10, warmup=2, learning_rate=1.0, schedule="linear")
    >>> [rate_at(i, s) for i in (0, 1, 2, 6)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * SCHEDULES[settings.schedule](min(done, 1.0))


def check_schedule(name: str) -> None:
    """Raise UsageError for an unknown schedule."""
    if name not in SCHEDULES:
        near = get_close_matches(name, SCHEDULES, n=1)
        fix = f"Did you mean {near[0]!r}?" if near else f"Choose one of: {', '.join(SCHEDULES)}."
        raise UsageError(f"Unknown schedule {name!r}.", fix=fix)


def has_own_mode(optimizer: Optimizer) -> bool:
    """Return whether an optimizer has train and eval modes with different parameters, as schedule-free ones do."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


class Average:
    """An exponential moving average of the factors, e ← decay·e + (1 - decay)·p, with a decay that starts small."""

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.decay, self.parameters = decay, list(parameters)
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average after optimizer step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Copy the average into the model."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            parameter.copy_(value)
