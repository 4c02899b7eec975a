"""Pictures as latents and captions as embeddings: computed once where that is possible, then the encoders go."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from krona_hub.aliases import Progress
from krona_hub.training.data.captions import drawn_caption, drawn_flip, fixed_caption
from krona_hub.training.data.dataset import Example
from krona_hub.training.data.images import Size, fitted, open_picture
from krona_hub.training.model.model_families import Frame, ModelFamily
from krona_hub.training.model.trained_layers import NONE
from krona_hub.training.randomness import generator
from krona_hub.training.settings import TrainingSettings

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class Encoded(NamedTuple):
    """A picture as the autoencoder sees it: a normal distribution of latents; on the CPU."""

    mean: Tensor  # (channels, height, width)
    std: Tensor  # the same shape
    conditions: dict[str, Tensor]  # what the family tells of its size and crop


@dataclass
class Encoder:
    """Encodes what is not known yet and remembers the rest."""

    pipe: Any
    family: ModelFamily
    settings: TrainingSettings
    device: torch.device
    dtype: torch.dtype
    pictures: dict[tuple[str, Size, bool], Encoded] = field(default_factory=dict)
    texts: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.pipe.vae.config  # the autoencoder itself may be gone when it is asked for
        self.shift, self.factor = float(config.get("shift_factor") or 0.0), float(config["scaling_factor"])

    @property
    def keeps_texts(self) -> bool:
        """Whether embeddings can be kept: not where the text encoders are trained."""
        return self.settings.cache and self.settings.text_encoders == NONE

    @torch.no_grad()
    def picture(self, example: Example, size: Size, flipped: bool) -> Encoded:
        key = (str(example.path), size, flipped)
        if key in self.pictures:
            return self.pictures[key]
        pixels, (top, left) = fitted(open_picture(example.path), size)
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        image = image.flip(-1) if flipped else image
        found = self.pipe.vae.encode(image.to(self.device, self.pipe.vae.dtype)).latent_dist
        frame = Frame(example.size[::-1], (top, left), size[::-1])
        encoded = Encoded(found.mean[0].float().cpu(), found.std[0].float().cpu(), self.family.frame(frame))
        if self.settings.cache:
            self.pictures[key] = encoded
        return encoded

    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Conditions of captions, (n, …) each."""
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

    def latents(self, encoded: Sequence[Encoded], draws: Sequence[torch.Generator]) -> Tensor:
        """(n, channels, height, width): a draw of each distribution, as the denoiser wants it."""
        drawn = [e.mean + e.std * torch.randn(e.mean.shape, generator=g) for e, g in zip(encoded, draws, strict=True)]
        return (torch.stack(drawn) - self.shift) * self.factor

    def fill(self, examples: Sequence[Example], sizes: Sequence[Size], captions: Iterable[str], told: Progress) -> None:
        """Encode everything that the training will ask for, so that the encoders can go."""
        flips = (False, True) if self.settings.flip else (False,)
        wanted = [(e, s, f) for e, s in zip(examples, sizes, strict=True) for f in flips]
        for done, (example, size, flipped) in enumerate(wanted):
            told(done, len(wanted))
            self.picture(example, size, flipped)
        if self.keeps_texts:
            self.text(list(dict.fromkeys(captions)))

    def free(self, keep_vae: bool) -> None:
        """Let go of the encoders: nothing calls them any more. A kept autoencoder waits on the CPU."""
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
    """Examples with their sizes, as batches for the model."""

    encoder: Encoder
    examples: tuple[Example, ...]
    sizes: tuple[Size, ...]
    settings: TrainingSettings  # of their captions

    @property
    def captions(self) -> list[str]:
        """Every caption that a training may ask for, unless it shuffles."""
        fixed = [fixed_caption(e.caption, self.settings) for e in self.examples]
        return [*fixed, ""] if self.settings.caption_dropout else fixed

    def batch(self, chosen: Sequence[int], step: int, samples: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """(n, channels, height, width) latents and the conditions, as the step and the sample numbers draw them."""
        settings = self.settings
        flips = [drawn_flip(settings, step, i) for i in samples]
        encoded = [self.encoder.picture(self.examples[e], self.sizes[e], f) for e, f in zip(chosen, flips, strict=True)]
        latents = self.encoder.latents(encoded, [generator(settings.seed, "latent", step, i) for i in samples])
        texts = [
            drawn_caption(self.examples[e].caption, settings, step, i) for e, i in zip(chosen, samples, strict=True)
        ]
        return latents, {**self.encoder.text(texts), **_stacked(encoded)}

    def fixed(self, chosen: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        """One example, the same at every call: for the validation."""
        encoded = [self.encoder.picture(self.examples[chosen], self.sizes[chosen], False)]
        latents = self.encoder.latents(encoded, [generator(seed, "validation latent", chosen)])
        text = fixed_caption(self.examples[chosen].caption, self.settings)
        return latents, {**self.encoder.text([text]), **_stacked(encoded)}


def _stacked(encoded: Sequence[Encoded]) -> dict[str, Tensor]:
    return {name: torch.stack([e.conditions[name] for e in encoded]) for name in encoded[0].conditions}
