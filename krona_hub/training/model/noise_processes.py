"""Noise and prediction targets of a model family: diffusion with epsilon or v-prediction, and flow matching.

    diffusion   noisy = √ᾱ x + √(1-ᾱ) ε      epsilon: ε      v: √ᾱ ε - √(1-ᾱ) x      sample: x      snr = ᾱ/(1-ᾱ)
    flow        noisy = (1-σ) x + σ ε         target: ε - x

Time is u in [0, 1) and increases with the noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from krona_hub.errors import UnsupportedError
from krona_hub.pipelines.randomness import generator
from krona_hub.training.settings import TrainingSettings


class Noised(NamedTuple):
    """Noisy latents and the target of the model."""

    noisy: Tensor  # (n, channels, height, width)
    target: Tensor  # the same shape
    timesteps: Tensor  # (n,) in the units of the model
    snr: Tensor | None  # (n,) signal-to-noise ratio; None if min-SNR does not apply


class Process(Protocol):
    """A process that turns images into noise."""

    @property
    def prediction(self) -> str: ...

    @property
    def sampling(self) -> str: ...  # default sampling of u

    def noised(self, latents: Tensor, noise: Tensor, u: Tensor) -> Noised: ...


@dataclass(frozen=True, eq=False)
class Diffusion:
    """The discrete noise levels of DDPM."""

    alphas: Tensor  # (timesteps,) ᾱ, decreasing
    prediction: str  # epsilon, v_prediction or sample
    sampling: str = "uniform"

    def noised(self, latents: Tensor, noise: Tensor, u: Tensor) -> Noised:
        t = (u * len(self.alphas)).long().clamp(0, len(self.alphas) - 1)
        alpha = self.alphas.to(latents.device)[t.to(latents.device)].to(latents.dtype)
        signal, spread = (x.reshape(-1, 1, 1, 1) for x in (alpha.sqrt(), (1 - alpha).sqrt()))
        targets = {
            "epsilon": noise,
            "v_prediction": signal * noise - spread * latents,
            "sample": latents,
        }
        noisy = signal * latents + spread * noise
        return Noised(noisy, targets[self.prediction], t.to(latents.device), alpha / (1 - alpha))


@dataclass(frozen=True, eq=False)
class Flow:
    """Rectified flow. `shift` moves the levels toward noise, as the scheduler of the pipeline does."""

    shift: float = 1.0
    timesteps: int = 1000
    prediction: str = "flow"
    sampling: str = "logit-normal"

    def noised(self, latents: Tensor, noise: Tensor, u: Tensor) -> Noised:
        level = (self.shift * u / (1 + (self.shift - 1) * u)).to(latents)
        sigma = level.reshape(-1, 1, 1, 1)
        return Noised((1 - sigma) * latents + sigma * noise, noise - latents, level * self.timesteps, None)


def diffusion_of(scheduler: Any) -> Diffusion:
    """Return the noise levels of a scheduler. Raises UnsupportedError for an unknown prediction type."""
    from diffusers import DDPMScheduler

    config = scheduler.config
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction", "sample"):
        raise UnsupportedError(
            f"Training is not supported for prediction type {prediction!r}.",
            fix="Use a base model with epsilon or v_prediction.",
        )
    own: Mapping[str, Any] = {k: v for k, v in config.items() if k in LEVELS}
    levels: Any = DDPMScheduler(**own)  # type: ignore[no-untyped-call]
    return Diffusion(levels.alphas_cumprod.float(), prediction)


LEVELS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


def flow_of(scheduler: Any) -> Flow:
    """Return the flow of a scheduler, with its shift if it is fixed.

    A shift that depends on the image size (FLUX) is ignored, as in other trainers of these models.
    """
    config = scheduler.config
    dynamic = bool(config.get("use_dynamic_shifting", False))
    return Flow(1.0 if dynamic else float(config.get("shift", 1.0)), int(config.get("num_train_timesteps", 1000)))


def sample_times(settings: TrainingSettings, process: Process, step: int, samples: tuple[int, ...]) -> Tensor:
    """Return (samples,) times u in [0, 1), float32, each from its own generator."""
    method = process.sampling if settings.timesteps == "auto" else settings.timesteps
    generators = [generator(settings.seed, "time", step, i) for i in samples]
    if method == "uniform":
        return torch.stack([torch.rand((), generator=g) for g in generators])
    normal = torch.stack([torch.randn((), generator=g) for g in generators])
    return torch.sigmoid(settings.logit_mean + settings.logit_std * normal).clamp(max=1 - 2**-24)


def loss_weights(snr: Tensor | None, prediction: str, gamma: float) -> Tensor | float:
    """Return min-SNR weights (Hang et al., 2023): min(snr, γ)/snr for epsilon and min(snr, γ)/(snr + 1) for v.

    The weight is 1 for other predictions and for γ = 0.

    >>> loss_weights(torch.tensor([0.0, 1.0, 10.0]), "epsilon", 5.0)
    tensor([1.0000, 1.0000, 0.5000])
    """
    if snr is None or not gamma or prediction not in ("epsilon", "v_prediction"):
        return 1.0
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1.0)
    return snr.clamp(max=gamma) / (snr + 1)
