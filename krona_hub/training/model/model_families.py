"""The kinds of models that can be trained, one value each around one loop: a new family is one entry of FAMILIES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from krona_hub.errors import UnsupportedError
from krona_hub.training.model.noise_processes import Process, diffusion_of, flow_of

Conditions = Mapping[str, Tensor]  # what the denoiser is told besides the noisy picture; (n, …) each


class Frame(NamedTuple):
    """Where a training picture comes from: SDXL is told. Pixels."""

    original: tuple[int, int]  # (height, width)
    crop: tuple[int, int]  # (top, left)
    target: tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class ModelFamily:
    """How one kind of pipeline is trained."""

    name: str
    pipelines: tuple[str, ...]  # classes of diffusers
    denoiser: str  # "unet" or "transformer"
    process: Callable[[Any], Process]  # from the pipeline's scheduler
    encode: Callable[[Any, list[str], torch.device], dict[str, Tensor]]  # captions → conditions, (n, …) each
    predict: Callable[[Any, Tensor, Tensor, Conditions, float], Tensor]  # model, noisy, timesteps, conditions, guidance
    frame: Callable[[Frame], dict[str, Tensor]] = lambda frame: {}  # conditions of one picture, without the batch


# --- Stable Diffusion ------------------------------------------------------------------------------------------------


def _encode_sd(pipe: Any, captions: list[str], device: torch.device) -> dict[str, Tensor]:
    embeds, _ = pipe.encode_prompt(captions, device, 1, False)
    return {"text": embeds}


def _predict_sd(model: Any, noisy: Tensor, t: Tensor, given: Conditions, _guidance: float) -> Tensor:
    out: Tensor = model(noisy, t, given["text"], return_dict=False)[0]
    return out


def _encode_sdxl(pipe: Any, captions: list[str], device: torch.device) -> dict[str, Tensor]:
    embeds, _, pooled, _ = pipe.encode_prompt(captions, device=device, do_classifier_free_guidance=False)
    return {"text": embeds, "pooled": pooled}


def _frame_sdxl(frame: Frame) -> dict[str, Tensor]:
    return {"time_ids": torch.tensor([*frame.original, *frame.crop, *frame.target], dtype=torch.float32)}


def _predict_sdxl(model: Any, noisy: Tensor, t: Tensor, given: Conditions, _guidance: float) -> Tensor:
    more = {"text_embeds": given["pooled"], "time_ids": given["time_ids"].to(noisy.dtype)}
    out: Tensor = model(noisy, t, given["text"], added_cond_kwargs=more, return_dict=False)[0]
    return out


# --- transformers with flow matching ---------------------------------------------------------------------------------


def _encode_sd3(pipe: Any, captions: list[str], device: torch.device) -> dict[str, Tensor]:
    embeds, _, pooled, _ = pipe.encode_prompt(captions, None, None, device=device, do_classifier_free_guidance=False)
    return {"text": embeds, "pooled": pooled}


def _predict_sd3(model: Any, noisy: Tensor, t: Tensor, given: Conditions, _guidance: float) -> Tensor:
    out: Tensor = model(
        hidden_states=noisy, timestep=t, encoder_hidden_states=given["text"], pooled_projections=given["pooled"],
        return_dict=False,
    )[0]  # fmt: skip
    return out


def _encode_flux(pipe: Any, captions: list[str], device: torch.device) -> dict[str, Tensor]:
    embeds, pooled, _ = pipe.encode_prompt(captions, None, device=device)
    return {"text": embeds, "pooled": pooled}


def _predict_flux(model: Any, noisy: Tensor, t: Tensor, given: Conditions, guidance: float) -> Tensor:
    """FLUX sees 2×2 patches as a row of tokens, and time in [0, 1]."""
    n, _, height, width = noisy.shape
    strength = torch.full((n,), guidance, device=noisy.device) if model.config.guidance_embeds else None
    out = model(
        hidden_states=packed(noisy), timestep=t / 1000, guidance=strength, pooled_projections=given["pooled"],
        encoder_hidden_states=given["text"], txt_ids=noisy.new_zeros(given["text"].shape[1], 3),
        img_ids=_positions(height // 2, width // 2).to(noisy), return_dict=False,
    )[0]  # fmt: skip
    return unpacked(out, height, width)


def packed(latents: Tensor) -> Tensor:
    """(n, c, h, w) → (n, h/2 · w/2, 4c): one token per 2×2 patch."""
    n, c, h, w = latents.shape
    return latents.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`.

    >>> x = torch.arange(96.0).reshape(1, 3, 4, 8)
    >>> torch.equal(unpacked(packed(x), 4, 8), x)
    True
    """
    n, _, c = tokens.shape
    patches = tokens.reshape(n, height // 2, width // 2, c // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(n, c // 4, height, width)


def _positions(rows: int, columns: int) -> Tensor:
    """(rows · columns, 3): 0, row, column of each token."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], -1).reshape(-1, 3).float()


FAMILIES: tuple[ModelFamily, ...] = (
    ModelFamily("sd", ("StableDiffusionPipeline",), "unet", diffusion_of, _encode_sd, _predict_sd),
    ModelFamily("sdxl", ("StableDiffusionXLPipeline",), "unet", diffusion_of, _encode_sdxl, _predict_sdxl, _frame_sdxl),
    ModelFamily("sd3", ("StableDiffusion3Pipeline",), "transformer", flow_of, _encode_sd3, _predict_sd3),
    ModelFamily("flux1", ("FluxPipeline",), "transformer", flow_of, _encode_flux, _predict_flux),
)


def family_of(pipe: Any) -> ModelFamily:
    """The family of a pipeline. Raises UnsupportedError for one that cannot be trained."""
    kind = type(pipe).__name__
    for family in FAMILIES:
        if kind in family.pipelines:
            return family
    known = ", ".join(p for f in FAMILIES for p in f.pipelines)
    raise UnsupportedError(f"krona does not train a {kind}.", fix=f"It trains {known}.")


def size_multiple(pipe: Any, family: ModelFamily) -> int:
    """Both sides of a picture are multiples of so many pixels: the autoencoder's factor and the denoiser's."""
    model = getattr(pipe, family.denoiser)
    halvings = 2 ** (len(model.config.block_out_channels) - 1) if family.denoiser == "unet" else 2
    return vae_factor(pipe) * halvings


def vae_factor(pipe: Any) -> int:
    """Pixels per latent along a side."""
    return int(2 ** (len(pipe.vae.config.block_out_channels) - 1))


def own_resolution(pipe: Any, family: ModelFamily) -> int:
    """Pixels along a side that the base was made for."""
    if family.name == "flux1":
        return 1024
    return int(getattr(pipe, family.denoiser).config.sample_size) * vae_factor(pipe)
