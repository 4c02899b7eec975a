"""The loss of a batch: predictions of the model for noisy latents against their targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from krona_hub.pipelines.randomness import generator, noise
from krona_hub.training.model.model_families import ModelFamily
from krona_hub.training.model.noise_processes import Noised, Process, loss_weights, sample_times
from krona_hub.training.settings import TrainingSettings

LEVELS = 4  # noise levels per validation image


@dataclass(frozen=True)
class Objective:
    """A denoiser and the loss of its predictions."""

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
        """Return the mean loss, (), with the noise and times of these samples. `target` overrides the usual target."""
        noised = self._noised(latents, step, samples)
        expected = noised.target if target is None else target
        return self._errors(noised, given, expected, self.settings.min_snr or 0.0).mean()

    @torch.no_grad()
    def predict(self, latents: Tensor, given: Mapping[str, Tensor], step: int, samples: Sequence[int]) -> Tensor:
        """Return the current prediction at the noise and times that `loss` uses, in the shape of the latents."""
        return self._predict(self._noised(latents, step, samples), given).float()

    @torch.no_grad()
    def validation_loss(self, latents: Tensor, given: Mapping[str, Tensor], chosen: int) -> float:
        """Return the unweighted loss of one image at fixed noise and LEVELS fixed times."""
        total = 0.0
        for level in range(LEVELS):
            source = generator(self.settings.seed, "validation", chosen, level)
            epsilon = torch.randn(latents.shape, generator=source)
            times = torch.tensor([(level + 0.5) / LEVELS])
            noised = self.process.noised(latents.to(self.device), epsilon.to(self.device), times)
            total += float(self._errors(noised, given, noised.target, 0.0).mean())
        return total / LEVELS

    def _noised(self, latents: Tensor, step: int, samples: Sequence[int]) -> Noised:
        s = self.settings
        epsilon = noise(latents.shape[1:], s.seed, step, samples, s.noise_offset)
        times = sample_times(s, self.process, step, tuple(samples))
        return self.process.noised(latents.to(self.device), epsilon.to(self.device), times)

    def _predict(self, noised: Noised, given: Mapping[str, Tensor]) -> Tensor:
        conditions = {name: t.to(self.device, self.dtype) if t.is_floating_point() else t for name, t in given.items()}
        return self.family.predict(
            self.model, noised.noisy.to(self.dtype), noised.timesteps, conditions, self.settings.guidance
        )

    def _errors(self, noised: Noised, given: Mapping[str, Tensor], target: Tensor, gamma: float) -> Tensor:
        """Return (n,) weighted mean squared errors, float32."""
        errors = (self._predict(noised, given).float() - target.float()).square().flatten(1).mean(1)
        return errors * loss_weights(noised.snr, self.process.prediction, gamma)
