"""The training loop of both stages: seeded by step, resumable after any interruption, with a moving average."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

CHECKPOINT_EVERY = 100  # steps


@dataclass(frozen=True)
class Recipe:
    """Length, batch size and learning rate of a training stage."""

    steps: int  # optimizer steps
    batch: int  # images per step
    rate: float  # maximum learning rate, followed by cosine decay to 1/50 of it
    warmup: int = 100  # steps
    average: float = 0.998  # decay of the moving average per step, after an initial ramp
    seed: int = 0


Loss = Callable[[nn.Module, torch.Generator], Tensor]


class Run:
    """The state of a training: a model, its moving average and its optimizer at a step, and a checkpoint file."""

    def __init__(self, model: nn.Module, recipe: Recipe, path: Path) -> None:
        self.model, self.recipe, self.path = model, recipe, path
        self.averaged = deepcopy(model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01)
        self.step = 0
        if path.exists():
            self._load()

    def train(self, loss: Loss) -> Iterator[int]:
        """Train until the end of the recipe; yield the number of each finished step."""
        started = time.process_time()
        while self.step < self.recipe.steps:
            value = self._one_step(loss)
            if self.step % 20 == 0:
                self._log(step=self.step, loss=round(value, 5), cpu_seconds=round(time.process_time() - started, 1))
            if self.step % CHECKPOINT_EVERY == 0 or self.step == self.recipe.steps:
                self._save()
            yield self.step

    def note(self, **fields: object) -> None:
        """Append a line to the log beside the checkpoint."""
        self._log(step=self.step, **fields)

    def _one_step(self, loss: Loss) -> float:
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.step, self.recipe)
        value = loss(self.model, generator)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self._average()
        return float(value.detach())

    @torch.no_grad()
    def _average(self) -> None:
        keep = min(self.recipe.average, (1 + self.step) / (10 + self.step))
        new, old = list(self.model.parameters()), list(self.averaged.parameters())
        torch._foreach_lerp_(old, new, 1 - keep)

    def _save(self) -> None:
        state = {"step": self.step, "model": self.model.state_dict(), "averaged": self.averaged.state_dict()}
        part = self.path.with_suffix(".part")
        torch.save(state | {"optimiser": self.optimizer.state_dict()}, part)
        part.rename(self.path)

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimiser"])
        self.step = state["step"]

    def _log(self, **fields: object) -> None:
        with self.path.with_suffix(".jsonl").open("a") as log:
            log.write(json.dumps(fields) + "\n")


def rate_at(step: int, recipe: Recipe) -> float:
    """Return the learning rate at a step: linear warm-up, then cosine decay.

    >>> recipe = Recipe(steps=1000, batch=1, rate=1.0)
    >>> [round(rate_at(step, recipe), 2) for step in (0, 49, 100, 550, 1000)]
    [0.01, 0.5, 1.0, 0.51, 0.02]
    """
    if step < recipe.warmup:
        return recipe.rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.rate * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
