"""The settings of a training run, defined once for the TOML file, the flags of `krona train` and Python.

This module does not import torch.
"""

# ruff: noqa: RUF009  `setting` returns a field, as dataclasses.field does

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

Rows = Literal["kron", "shuffled"]
Mixed = Literal["auto", "no", "bf16", "fp16"]
TypeName = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "nf4", "int8", "int8-torchao"]
TimestepSampling = Literal["auto", "uniform", "logit-normal"]
PriorTarget = Literal["pictures", "base"]
OnNan = Literal["stop", "skip"]
BIG_SEED = 2**63 - 1


def setting(default: Any, help: str, *, panel: str, least: float | None = None, most: float | None = None) -> Any:
    """Return a dataclass field with its help text, help panel and inclusive bounds as metadata."""
    about = {"help": help, "panel": panel, "least": least, "most": most}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=about)
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of a training run.

    The constructor does not check values; `train`, `check_training` and `configuration.checked` do. `None` selects a
    default that depends on the base model or the device. The help text of each field is in its metadata.

    Parameters
    ----------
    base, data, prompt, output : str
        Base model, image folder, default caption and run folder.
    steps, batch_size, accumulation : int, default 500, 1, 1
        Optimizer steps; images per process and forward pass; forward passes per step.
    learning_rate, resolution, seed, device : float, int or None, int, str or None
        Rate after warm-up (default 1e-3), √(width · height) in pixels, random seed and device.
    shape, shapes, budget : str, dict of str, int or None
        Shape ``a1xa2`` of A or ``auto``, shapes by regular expression of layer names, and the parameter budget of
        ``auto``.
    terms, rank, rows : int, int or None, {"kron", "shuffled"}
        Number of Kronecker products per layer (default 1), rank of B and row order of ΔW.
    targets, text_encoders, init : str, str, str or None
        Layers of the denoiser (default ``attn``), layers of the text encoders (default ``none``), and an adapter to
        start from.
    trigger_word, caption_template, caption_dropout, caption_shuffle, keep_parts : str, str, float, bool, int
        Captions: see `krona_hub.training.data.captions`.
    flip, buckets, skip_bad, held_out, validation_data : bool, bool, bool, int, str or None
        Mirroring, aspect-ratio buckets (default on), unreadable files, and validation images.
    prior_data, prior_prompt, prior_pictures, prior_target, prior_weight
        Prior preservation with regularization images (Ruiz et al., DreamBooth, 2023).
    min_snr, timesteps, logit_mean, logit_std, noise_offset, guidance
        Loss weights (min-SNR, Hang et al., 2023; gamma 5 by default), timestep sampling and noise.
    optimizer, weight_decay, beta1, beta2, epsilon, schedule, warmup, clip, ema, nan
        Optimizer, learning rate schedule, gradient clipping, moving average and reaction to NaN.
    base_dtype, mixed_precision, cache, gradient_checkpointing, compile, quantize
        Speed and memory.
    checkpoint_every, keep_checkpoints, validate_every, sample_every : int
        Intervals in steps; 0 disables them. The last step always saves a checkpoint.
    sample_prompts, sample_steps, sample_guidance, export, trackers, licence
        Samples, companion exports, trackers and the license of the adapter.

    Examples
    --------
    >>> settings = TrainingSettings(steps=200, shape="64x4", shapes={"attn2.to_[kv]$": "32x8"})
    >>> settings.steps, settings.learning_rate, settings.named["shape"]
    (200, 0.001, '64x4')
    """

    # base model and data
    base: str = setting("", "Base model: a diffusers folder, a checkpoint file or a Hub id.", panel="Main")
    data: str = setting("", "Folder of training images, with captions in .txt files or metadata.jsonl.", panel="Main")
    prompt: str = setting("", "Caption of images that have none.", panel="Main")
    output: str = setting("", "Run folder.", panel="Main")
    steps: int = setting(500, "Number of optimizer steps.", panel="Main", least=1)
    batch_size: int = setting(1, "Images per process and forward pass.", panel="Main", least=1)
    accumulation: int = setting(1, "Forward passes per optimizer step.", panel="Main", least=1)
    learning_rate: float = setting(1e-3, "Learning rate after warm-up.", panel="Main", least=0.0)
    resolution: int | None = setting(
        None, "Resolution in pixels: √(width · height). Default: that of the base model.", panel="Main", least=8
    )
    seed: int = setting(0, "Random seed.", panel="Main", least=0, most=BIG_SEED)
    device: str | None = setting(
        None, "Device: cpu, cuda, cuda:1 or mps. Default: the best available device.", panel="Main"
    )

    # adapter
    shape: str = setting("auto", "Shape of A as a1xa2, or auto: the best shape within --budget.", panel="Adapter")
    shapes: Mapping[str, str] = setting({}, "Shape of the layers whose names match REGEX.", panel="Adapter")
    budget: int | None = setting(None, "Parameter budget of --shape auto over all layers.", panel="Adapter", least=1)
    terms: int = setting(1, "Number of Kronecker products summed per layer.", panel="Adapter", least=1)
    rank: int | None = setting(None, "Rank of B. Default: B is a full matrix.", panel="Adapter", least=1)
    rows: Rows = setting("kron", "Row order of ΔW; shuffled is the order of DiffuseKronA.", panel="Adapter")
    targets: str = setting(
        "attn", "Layers to train: attn, attn+ff, all, another named set, or a regular expression.", panel="Adapter"
    )
    text_encoders: str = setting("none", "Text encoder layers to train, as in --targets, or none.", panel="Adapter")
    init: str | None = setting(None, "Adapter file to start from instead of zero.", panel="Adapter")

    # images and captions
    trigger_word: str = setting("", "Word put in front of captions that lack it.", panel="Data")
    caption_template: str = setting("{caption}", "Template around {caption}.", panel="Data")
    caption_dropout: float = setting(
        0.0, "Fraction of captions replaced by an empty one.", panel="Data", least=0.0, most=1.0
    )
    caption_shuffle: bool = setting(False, "Shuffle the comma-separated parts of captions.", panel="Data")
    keep_parts: int = setting(1, "Leading caption parts excluded from shuffling.", panel="Data", least=0)
    flip: bool = setting(False, "Mirror half of the images at random.", panel="Data")
    buckets: bool = setting(True, "Keep aspect ratios, in a few image sizes; otherwise crop to squares.", panel="Data")
    skip_bad: bool = setting(False, "Skip images that cannot be read.", panel="Data")
    held_out: int = setting(0, "Number of images held out for validation.", panel="Data", least=0)
    validation_data: str | None = setting(None, "Folder of validation images.", panel="Data")
    prior_data: str | None = setting(None, "Folder of regularization images (prior preservation).", panel="Data")
    prior_prompt: str = setting(
        "", "Prompt of regularization images; generated ones take the alternatives of {a|b} in turn.", panel="Data"
    )
    prior_pictures: int = setting(
        0, "Number of regularization images; missing ones are generated with the base model.", panel="Data", least=0
    )
    prior_target: PriorTarget = setting(
        "pictures", "Target on regularization images: the images, or the base model's predictions.", panel="Data"
    )
    prior_weight: float = setting(1.0, "Weight of the prior-preservation loss.", panel="Data", least=0.0)

    # loss
    min_snr: float | None = setting(
        5.0, "Gamma of min-SNR, for epsilon and v-prediction; 0 disables it.", panel="Loss", least=0
    )
    timesteps: TimestepSampling = setting("auto", "Timestep sampling.", panel="Loss")
    logit_mean: float = setting(0.0, "Mean of logit-normal timestep sampling.", panel="Loss")
    logit_std: float = setting(1.0, "Standard deviation of logit-normal timestep sampling.", panel="Loss", least=0.0)
    noise_offset: float = setting(0.0, "Strength of the per-channel noise offset.", panel="Loss", least=0.0)
    guidance: float = setting(1.0, "Guidance value passed to guidance-distilled transformers.", panel="Loss", least=0.0)

    # optimizer
    optimizer: str = setting("adamw", "Optimizer: adamw, adamw-8bit, prodigy or schedule-free.", panel="Optimizer")
    weight_decay: float = setting(0.01, "Weight decay of the factors.", panel="Optimizer", least=0.0)
    beta1: float = setting(0.9, "Adam β₁.", panel="Optimizer", least=0.0, most=1.0)
    beta2: float = setting(0.999, "Adam β₂.", panel="Optimizer", least=0.0, most=1.0)
    epsilon: float = setting(1e-8, "Adam ε.", panel="Optimizer", least=0.0)
    schedule: str = setting("constant", "Learning rate schedule: constant, linear or cosine.", panel="Optimizer")
    warmup: int = setting(0, "Number of warm-up steps.", panel="Optimizer", least=0)
    clip: float = setting(1.0, "Maximum gradient norm; 0 disables clipping.", panel="Optimizer", least=0.0)
    ema: float = setting(
        0.0, "Decay of the moving average of the factors; 0 disables it.", panel="Optimizer", least=0.0, most=0.999999
    )
    nan: OnNan = setting("stop", "Action when the loss becomes NaN or infinite.", panel="Optimizer")

    # speed and memory
    base_dtype: TypeName = setting(
        "auto", "Data type of the frozen base model; auto: bfloat16 on CUDA, else float32.", panel="Machine"
    )
    mixed_precision: Mixed = setting("auto", "Autocast mode of the forward pass.", panel="Machine")
    cache: bool = setting(True, "Encode images and captions once, then free the encoders.", panel="Machine")
    gradient_checkpointing: bool | None = setting(
        None, "Trade speed for memory. Default: on for a GPU, off for a CPU.", panel="Machine"
    )
    compile: bool = setting(False, "Compile the denoiser with torch.compile.", panel="Machine")
    quantize: Quantization = setting("none", "Quantization of the base model.", panel="Machine")

    # outputs
    checkpoint_every: int = setting(100, "Steps between checkpoints; 0 saves only the last.", panel="Output", least=0)
    keep_checkpoints: int = setting(2, "Number of recent checkpoints to keep.", panel="Output", least=1)
    validate_every: int = setting(0, "Steps between validations; 0 disables validation.", panel="Output", least=0)
    sample_every: int = setting(0, "Steps between samples; 0 disables samples.", panel="Output", least=0)
    sample_prompts: tuple[str, ...] = setting((), "Prompts of the sample images.", panel="Output")
    sample_steps: int = setting(25, "Denoising steps per generated image.", panel="Output", least=1)
    sample_guidance: float = setting(5.0, "Guidance of generated images.", panel="Output", least=0.0)
    export: tuple[str, ...] = setting((), "Formats of companion exports: lora, lycoris, …", panel="Output")
    trackers: tuple[str, ...] = setting(
        ("auto",), "Trackers: tensorboard, wandb, trackio, none; auto uses TensorBoard if installed.", panel="Output"
    )
    licence: str | None = setting(None, "License of the adapter.", panel="Output")

    @property
    def named(self) -> dict[str, Any]:
        """Mapping of field names to values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class SettingKind:
    """Type, choices and bounds of a setting, parsed from its annotation and metadata."""

    def __init__(self, about: Field[Any], annotation: Any) -> None:
        parts = [a for a in get_args(annotation) if a is not type(None)] if _is_union(annotation) else [annotation]
        self.name, self.metadata, self.default = about.name, about.metadata, about.default
        self.optional = _is_union(annotation)
        self.choices: tuple[str, ...] = get_args(parts[0]) if getattr(parts[0], "__origin__", None) is Literal else ()
        origin = getattr(parts[0], "__origin__", parts[0])
        self.type: type = str if self.choices else Mapping if origin is Mapping else origin
        # lists are comma-separated, except prompts, which contain commas themselves
        self.has_commas = self.type is tuple and self.name != "sample_prompts"

    @property
    def flag(self) -> str:
        """
        >>> KINDS["batch_size"].flag
        '--batch-size'
        """
        return "--" + self.name.replace("_", "-")


def _is_union(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


def _kinds() -> dict[str, SettingKind]:
    hints = get_type_hints(TrainingSettings)
    return {f.name: SettingKind(f, hints[f.name]) for f in fields(TrainingSettings)}


KINDS: Mapping[str, SettingKind] = _kinds()
