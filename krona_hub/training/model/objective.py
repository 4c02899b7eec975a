"""The loss of a batch: what the model says of a noisy picture against what it should say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from krona_hub.training.model.model_families import ModelFamily
from krona_hub.training.model.noise_processes import Noised, Process, drawn_times, loss_weights
from krona_hub.training.randomness import generator, noise
from krona_hub.training.settings import TrainingSettings

LEVELS = 4  # noise levels that the validation sees of each picture


@dataclass(frozen=True)
class Objective:
    """A denoiser and how its answers are judged."""

    model: Any
    family: ModelFamily
    process: Process
    settings: TrainingSettings
    device: torch.device
    dtype: torch.dtype  # of the denoiser's input

    def loss(
        self, latents: Tensor, given: Mapping[str, Tensor], step: int, samples: Sequence[int],
        target: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Mean over the samples, with noise and times drawn for them; (). `target` takes the place of what the noisy
        pictures themselves ask for.
        """
        noised = self._noised(latents, step, samples)
        wanted = noised.target if target is None else target
        return self._errors(noised, given, wanted, self.settings.min_snr or 0.0).mean()

    @torch.no_grad()
    def answer(self, latents: Tensor, given: Mapping[str, Tensor], step: int, samples: Sequence[int]) -> Tensor:
        """What the denoiser says, as it is now, at the noise and the times that `loss` draws; as the latents."""
        return self._said(self._noised(latents, step, samples), given).float()

    @torch.no_grad()
    def validation_loss(self, latents: Tensor, given: Mapping[str, Tensor], chosen: int) -> float:
        """Of one picture at fixed noise and LEVELS fixed times, unweighted."""
        total = 0.0
        for level in range(LEVELS):
            source = generator(self.settings.seed, "validation", chosen, level)
            drawn = torch.randn(latents.shape, generator=source)
            times = torch.tensor([(level + 0.5) / LEVELS])
            noised = self.process.noised(latents.to(self.device), drawn.to(self.device), times)
            total += float(self._errors(noised, given, noised.target, 0.0).mean())
        return total / LEVELS

    def _noised(self, latents: Tensor, step: int, samples: Sequence[int]) -> Noised:
        s = self.settings
        drawn = noise(latents.shape[1:], s.seed, step, samples, s.noise_offset)
        times = drawn_times(s, self.process, step, tuple(samples))
        return self.process.noised(latents.to(self.device), drawn.to(self.device), times)

    def _said(self, noised: Noised, given: Mapping[str, Tensor]) -> Tensor:
        told = {name: t.to(self.device, self.dtype) if t.is_floating_point() else t for name, t in given.items()}
        return self.family.predict(
            self.model, noised.noisy.to(self.dtype), noised.timesteps, told, self.settings.guidance
        )

    def _errors(self, noised: Noised, given: Mapping[str, Tensor], target: Tensor, gamma: float) -> Tensor:
        """(n,) weighted mean square errors, float32."""
        errors = (self._said(noised, given).float() - target.float()).square().flatten(1).mean(1)
        return errors * loss_weights(noised.snr, self.process.prediction, gamma)
