"""The model families that can be trained. To support another family, add an entry to FAMILIES."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from krona_hub.errors import UnsupportedError
from krona_hub.training.model.noise_processes import Process, diffusion_of, flow_of

Conditions = Mapping[str, Tensor]  # inputs of the denoiser besides the noisy latents; (n, …) each


class Frame(NamedTuple):
    """Original size and crop of a training image in pixels, which SDXL uses as conditions."""

    original: tuple[int, int]  # (height, width)
    crop: tuple[int, int]  # (top, left)
    target: tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class ModelFamily:
    """How to train one family of pipelines."""

    name: str
    pipelines: tuple[str, ...]  # class names in diffusers
    denoiser: str  # "unet" or "transformer"
    process: Callable[[Any], Process]  # from the pipeline's scheduler
    encode: Callable[[Any, list[str], torch.device], dict[str, Tensor]]  # captions → conditions, (n, …) each
    predict: Callable[[Any, Tensor, Tensor, Conditions, float], Tensor]  # model, noisy, timesteps, conditions, guidance
    frame: Callable[[Frame], dict[str, Tensor]] = lambda frame: {}  # conditions of one image, without a batch dimension


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
    conditions = {"text_embeds": given["pooled"], "time_ids": given["time_ids"].to(noisy.dtype)}
    out: Tensor = model(noisy, t, given["text"], added_cond_kwargs=conditions, return_dict=False)[0]
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
    """FLUX takes 2×2 patches as a sequence of tokens, and time in [0, 1]."""
    n, _, height, width = noisy.shape
    scale = torch.full((n,), guidance, device=noisy.device) if model.config.guidance_embeds else None
    out = model(
        hidden_states=packed(noisy), timestep=t / 1000, guidance=scale, pooled_projections=given["pooled"],
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
    """Return (rows · columns, 3): 0, row and column of each token."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], -1).reshape(-1, 3).float()


FAMILIES: tuple[ModelFamily, ...] = (
    ModelFamily("sd", ("StableDiffusionPipeline",), "unet", diffusion_of, _encode_sd, _predict_sd),
    ModelFamily("sdxl", ("StableDiffusionXLPipeline",), "unet", diffusion_of, _encode_sdxl, _predict_sdxl, _frame_sdxl),
    ModelFamily("sd3", ("StableDiffusion3Pipeline",), "transformer", flow_of, _encode_sd3, _predict_sd3),
    ModelFamily("flux1", ("FluxPipeline",), "transformer", flow_of, _encode_flux, _predict_flux),
)


def family_of(pipe: Any) -> ModelFamily:
    """Return the family of a pipeline. Raises UnsupportedError if it cannot be trained."""
    kind = type(pipe).__name__
    for family in FAMILIES:
        if kind in family.pipelines:
            return family
    known = ", ".join(p for f in FAMILIES for p in f.pipelines)
    raise UnsupportedError(f"Training is not supported for {kind}.", fix=f"Use a base model for {known}.")


def size_multiple(pipe: Any, family: ModelFamily) -> int:
    """Return the multiple, in pixels, of both image sides: the factor of the autoencoder times that of the denoiser."""
    model = getattr(pipe, family.denoiser)
    halvings = 2 ** (len(model.config.block_out_channels) - 1) if family.denoiser == "unet" else 2
    return vae_factor(pipe) * halvings


def vae_factor(pipe: Any) -> int:
    """Return the pixels per latent along a side."""
    return int(2 ** (len(pipe.vae.config.block_out_channels) - 1))


def own_resolution(pipe: Any, family: ModelFamily) -> int:
    """Return the native resolution of the base model, in pixels along a side."""
    if family.name == "flux1":
        return 1024
    return int(getattr(pipe, family.denoiser).config.sample_size) * vae_factor(pipe)
