"""Encode images as latents and captions as embeddings, once if possible, so that the encoders can be freed."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from krona_hub.aliases import Progress
from krona_hub.pipelines.randomness import generator
from krona_hub.training.data.captions import fixed_caption, sample_caption, sample_flip
from krona_hub.training.data.dataset import Example
from krona_hub.training.data.images import Size, fitted, open_image
from krona_hub.training.model.model_families import Frame, ModelFamily
from krona_hub.training.model.trained_layers import NONE
from krona_hub.training.settings import TrainingSettings

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class Encoded(NamedTuple):
    """An encoded image: a normal distribution of latents, on the CPU."""

    mean: Tensor  # (channels, height, width)
    std: Tensor  # (channels, height, width)
    conditions: dict[str, Tensor]  # size and crop, as the model family expects them


@dataclass
class Encoder:
    """Encodes images and captions, and caches the results if the cache is enabled."""

    pipe: Any
    family: ModelFamily
    settings: TrainingSettings
    device: torch.device
    dtype: torch.dtype
    images: dict[tuple[str, Size, bool], Encoded] = field(default_factory=dict)
    texts: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.pipe.vae.config  # the autoencoder itself may be freed before `latents` is called
        self.shift, self.factor = float(config.get("shift_factor") or 0.0), float(config["scaling_factor"])

    @property
    def keeps_texts(self) -> bool:
        """Whether text embeddings can be cached, which is not the case if the text encoders are trained."""
        return self.settings.cache and self.settings.text_encoders == NONE

    @torch.no_grad()
    def image(self, example: Example, size: Size, flipped: bool) -> Encoded:
        """Return the latent distribution of an image at `size` (width, height)."""
        key = (str(example.path), size, flipped)
        if key in self.images:
            return self.images[key]
        pixels, (top, left) = fitted(open_image(example.path), size)
        pixel_values = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        pixel_values = pixel_values.flip(-1) if flipped else pixel_values
        found = self.pipe.vae.encode(pixel_values.to(self.device, self.pipe.vae.dtype)).latent_dist
        frame = Frame(example.size[::-1], (top, left), size[::-1])
        encoded = Encoded(found.mean[0].float().cpu(), found.std[0].float().cpu(), self.family.frame(frame))
        if self.settings.cache:
            self.images[key] = encoded
        return encoded

    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return the conditions of captions, (n, …) each."""
        if not self.keeps_texts:
            return self._encoded(list(captions))
        for caption in captions:
            if caption not in self.texts:
                with torch.no_grad():
                    self.texts[caption] = {k: t.cpu() for k, t in self._encoded([caption]).items()}
        rows = [self.texts[caption] for caption in captions]
        return {name: torch.cat([row[name] for row in rows]).to(self.device) for name in rows[0]}

    def _encoded(self, captions: list[str]) -> dict[str, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.settings.text_encoders != NONE):
            return self.family.encode(self.pipe, captions, self.device)

    def latents(self, encoded: Sequence[Encoded], generators: Sequence[torch.Generator]) -> Tensor:
        """Sample each distribution and scale the result for the denoiser: (n, channels, height, width)."""
        pairs = zip(encoded, generators, strict=True)
        samples = [e.mean + e.std * torch.randn(e.mean.shape, generator=g) for e, g in pairs]
        return (torch.stack(samples) - self.shift) * self.factor

    def fill(
        self, examples: Sequence[Example], sizes: Sequence[Size], captions: Iterable[str], progress: Progress
    ) -> None:
        """Encode everything that the run needs, so that the encoders can be freed."""
        flips = (False, True) if self.settings.flip else (False,)
        variants = [(e, s, f) for e, s in zip(examples, sizes, strict=True) for f in flips]
        for done, (example, size, flipped) in enumerate(variants):
            progress(done, len(variants))
            self.image(example, size, flipped)
        if self.keeps_texts:
            self.text(list(dict.fromkeys(captions)))

    def free(self, keep_vae: bool) -> None:
        """Free the encoders if the cache replaces them. An autoencoder that is kept moves to the CPU."""
        if not self.settings.cache:
            return
        if keep_vae:
            self.pipe.vae.to("cpu")
        else:
            self.pipe.vae = None
        if self.keeps_texts and not self.settings.caption_shuffle:
            for name in ENCODERS:
                if getattr(self.pipe, name, None) is not None:
                    setattr(self.pipe, name, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Source:
    """Examples with their sizes, and the batches of latents and conditions made from them."""

    encoder: Encoder
    examples: tuple[Example, ...]
    sizes: tuple[Size, ...]
    settings: TrainingSettings  # of the captions

    @property
    def captions(self) -> list[str]:
        """Every caption that a run without shuffling can use."""
        fixed = [fixed_caption(e.caption, self.settings) for e in self.examples]
        return [*fixed, ""] if self.settings.caption_dropout else fixed

    def batch(self, chosen: Sequence[int], step: int, samples: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (n, channels, height, width) latents and the conditions, sampled by step and sample numbers."""
        settings = self.settings
        flips = [sample_flip(settings, step, i) for i in samples]
        encoded = [self.encoder.image(self.examples[e], self.sizes[e], f) for e, f in zip(chosen, flips, strict=True)]
        latents = self.encoder.latents(encoded, [generator(settings.seed, "latent", step, i) for i in samples])
        pairs = zip(chosen, samples, strict=True)
        texts = [sample_caption(self.examples[e].caption, settings, step, i) for e, i in pairs]
        return latents, {**self.encoder.text(texts), **_stacked(encoded)}

    def fixed(self, chosen: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return one example for validation, identical at every call."""
        encoded = [self.encoder.image(self.examples[chosen], self.sizes[chosen], False)]
        latents = self.encoder.latents(encoded, [generator(seed, "validation latent", chosen)])
        text = fixed_caption(self.examples[chosen].caption, self.settings)
        return latents, {**self.encoder.text([text]), **_stacked(encoded)}


def _stacked(encoded: Sequence[Encoded]) -> dict[str, Tensor]:
    return {name: torch.stack([e.conditions[name] for e in encoded]) for name in encoded[0].conditions}
