"""Tiny models and pipelines with random weights, built offline: real architectures at a hundredth of the size."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F


def _text_config(width: int = 24, **more):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        hidden_size=width, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
        max_position_embeddings=16, projection_dim=16, eos_token_id=63, bos_token_id=62, **more,
    )  # fmt: skip


def _unet(**more):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=4, out_channels=4,
        norm_num_groups=8, attention_head_dim=8, **more,
    )  # fmt: skip


def _seeded(build):
    torch.manual_seed(7)
    return build().eval().requires_grad_(False)


@lru_cache
def _sd15():
    from transformers import CLIPTextModel

    unet = _seeded(
        lambda: _unet(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24,
        )
    )
    return unet, _seeded(lambda: CLIPTextModel(_text_config()))


def sd15():
    """A Stable Diffusion 1.5 pipeline without tokenizer: a U-Net with 1×1 conv projections, and one CLIP."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    unet, text = copy.deepcopy(_sd15())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return StableDiffusionPipeline(
            vae=_vae(), text_encoder=text, tokenizer=None, unet=unet, scheduler=DDIMScheduler(),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip


@lru_cache
def _sdxl():
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    unet = _seeded(
        lambda: _unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
            cross_attention_dim=48,
        )
    )
    return (
        unet,
        _seeded(lambda: CLIPTextModel(_text_config())),
        _seeded(lambda: CLIPTextModelWithProjection(_text_config())),
    )


def sdxl():
    """A Stable Diffusion XL pipeline without tokenizers: linear projections, two text encoders."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    unet, one, two = copy.deepcopy(_sdxl())
    return StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=one, text_encoder_2=two, tokenizer=None, tokenizer_2=None, unet=unet,
        scheduler=DDIMScheduler(), add_watermarker=False,
    )  # fmt: skip


@lru_cache
def _flux():
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextModel

    transformer = _seeded(
        lambda: FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=24, pooled_projection_dim=24, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
        )
    )  # fmt: skip
    return transformer, _seeded(lambda: CLIPTextModel(_text_config()))


def flux():
    """A FLUX.1 pipeline with a CLIP and no T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    transformer, text = copy.deepcopy(_flux())
    return FluxPipeline(
        vae=_vae(), text_encoder=text, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


@lru_cache
def _sd3():
    from diffusers import SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection

    transformer = _seeded(
        lambda: SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=24,
            pos_embed_max_size=8,
        )
    )  # fmt: skip
    encoders = [_seeded(lambda: CLIPTextModelWithProjection(_text_config())) for _ in range(2)]
    return transformer, *encoders


def sd3():
    """A Stable Diffusion 3 pipeline with both CLIPs and no T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    transformer, one, two = copy.deepcopy(_sd3())
    return StableDiffusion3Pipeline(
        vae=_vae(), text_encoder=one, tokenizer=None, text_encoder_2=two, tokenizer_2=None, text_encoder_3=None,
        tokenizer_3=None, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


@lru_cache
def _cached_vae():
    from diffusers import AutoencoderKL

    return _seeded(
        lambda: AutoencoderKL(
            block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
            latent_channels=4, norm_num_groups=4, sample_size=16,
        )
    )  # fmt: skip


def _vae():
    return copy.deepcopy(_cached_vae())


def components(pipe) -> dict[str, torch.nn.Module]:
    """The models of a pipeline that adapters are for."""
    names = ("unet", "transformer", "text_encoder", "text_encoder_2")
    return {name: model for name in names if (model := getattr(pipe, name, None)) is not None}


def module_of(pipe, layer: str) -> torch.nn.Module:
    """The module behind a canonical layer name."""
    component, _, path = layer.partition(".")
    model = components(pipe)[component]
    if hasattr(model, "text_model") and path != "text_projection":
        model = model.text_model
    return model.get_submodule(path)


def layers(pipe, *endings: str) -> dict[str, tuple[int, ...]]:
    """Canonical name -> weight shape of every linear and convolution whose name has one of the endings."""
    return {
        f"{component}.{path.removeprefix('text_model.')}": tuple(module.weight.shape)
        for component, model in components(pipe).items()
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and path.endswith(endings or "")
    }


def save(pipe, folder) -> str:
    """The components as a diffusers folder, to be given as a base."""
    for name, model in components(pipe).items():
        model.save_pretrained(folder / name)
    return str(folder)


@torch.no_grad()
def added(pipe, adapter):
    """The pipeline with every ΔW of the adapter added to its weights: what a loaded adapter must equal."""
    for layer, delta in adapter.layers.items():
        weight = module_of(pipe, layer).weight
        weight += delta.dense(weight).to(weight.dtype)
    return pipe


@contextmanager
def hooked(pipe, deltas: Mapping[str, torch.Tensor], weight: float = 1.0):
    """The pipeline where every layer adds F.linear(x, w·ΔW), or the convolution, to what it computes: an adapter
    that was loaded and not merged."""

    def adding(module, delta):
        delta = weight * delta.to(module.weight.dtype).reshape(module.weight.shape)

        def hook(_module, inputs, output):
            if isinstance(module, torch.nn.Linear):
                return output + F.linear(inputs[0], delta)
            sizes = module.stride, module.padding, module.dilation, module.groups
            return output + F.conv2d(inputs[0], delta, None, *sizes)

        return module.register_forward_hook(hook)

    handles = [adding(module_of(pipe, layer), delta) for layer, delta in deltas.items()]
    yield pipe
    for handle in handles:
        handle.remove()


def deltas(pipe, adapter) -> dict[str, torch.Tensor]:
    """Layer -> ΔW of an adapter for this pipeline."""
    return {layer: delta.dense(module_of(pipe, layer).weight) for layer, delta in adapter.layers.items()}


def outputs(pipe) -> dict[str, torch.Tensor]:
    """Component -> what it makes of a fixed input."""
    return {name: output(model) for name, model in components(pipe).items()}


@torch.no_grad()
def output(model) -> torch.Tensor:
    """What a model of this file makes of a fixed input."""
    kind, generator = type(model).__name__, torch.Generator().manual_seed(11)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    if kind == "UNet2DConditionModel":
        width = model.config.cross_attention_dim
        more = {"text_embeds": noise(2, 16), "time_ids": noise(2, 6)} if model.config.addition_embed_type else None
        return model(noise(2, 4, 16, 16), torch.tensor(5), noise(2, 7, width), added_cond_kwargs=more).sample
    if kind == "FluxTransformer2DModel":
        return model(
            hidden_states=noise(1, 16, 4), encoder_hidden_states=noise(1, 6, 24), pooled_projections=noise(1, 24),
            timestep=torch.tensor([0.5]), img_ids=noise(16, 3), txt_ids=torch.zeros(6, 3), guidance=torch.tensor([3.5]),
        ).sample  # fmt: skip
    if kind == "SD3Transformer2DModel":
        return model(
            hidden_states=noise(1, 4, 8, 8), encoder_hidden_states=noise(1, 6, 24), pooled_projections=noise(1, 24),
            timestep=torch.tensor([500.0]),
        ).sample  # fmt: skip
    return model(torch.arange(1, 13)[None]).last_hidden_state
