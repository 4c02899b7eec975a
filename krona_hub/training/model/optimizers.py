"""What moves the factors: optimizers by name, learning rates as a function of the step, a running average."""

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
    """An optimizer: where it comes from, and what it is given."""

    module: str
    class_name: str
    package: str | None  # to install; None for what comes with torch
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
    ),  # warmed up by `rate_at`
}
SCHEDULES: Mapping[str, Callable[[float], float]] = {  # share of the steps that are done -> factor
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + cos(pi * done)) / 2,
}


def make_optimizer(parameters: Sequence[Tensor], settings: TrainingSettings) -> Optimizer:
    """Raises UsageError for an unknown name, NoDeviceError where its package is not installed."""
    kind = OPTIMIZERS.get(settings.optimizer)
    if kind is None:
        near = get_close_matches(settings.optimizer, OPTIMIZERS, n=1)
        fix = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(OPTIMIZERS)}."
        raise UsageError(f"there is no optimizer {settings.optimizer!r}.", fix=fix)
    try:
        made: Optimizer = getattr(import_module(kind.module), kind.class_name)(parameters, **kind.arguments(settings))
    except ImportError as error:
        raise NoDeviceError(
            f"the optimizer {settings.optimizer} needs the package {kind.package}, which is not installed.",
            fix=f"pip install {kind.package}, or --optimizer adamw.",
        ) from error
    return made


def rate_at(step: int, settings: TrainingSettings) -> float:
    """The learning rate of a step, which counts from 0: it grows through the warm-up, then follows the schedule.

    >>> s = TrainingSettings(steps=10, warmup=2, learning_rate=1.0, schedule="linear")
    >>> [rate_at(i, s) for i in (0, 1, 2, 6)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * SCHEDULES[settings.schedule](min(done, 1.0))


def check_schedule(name: str) -> None:
    """Raise UsageError for a schedule that is not known."""
    if name not in SCHEDULES:
        near = get_close_matches(name, SCHEDULES, n=1)
        fix = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(SCHEDULES)}."
        raise UsageError(f"there is no schedule {name!r}.", fix=fix)


def has_own_mode(optimizer: Optimizer) -> bool:
    """Whether its parameters are others while it trains: schedule-free optimizers must be told."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


class Average:
    """A running average of the factors, e ← decay·e + (1 - decay)·p, with a decay that starts small."""

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.decay, self.parameters = decay, list(parameters)
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the optimizer step that counts from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def give(self) -> None:
        """The average into the model."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            parameter.copy_(value)
