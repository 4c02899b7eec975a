"""Every setting of a training, once: the TOML file, the flags of `krona train` and Python share these fields.

Torch-free.
"""

# ruff: noqa: RUF009  `setting` makes a field, as dataclasses.field does

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

Rows = Literal["kron", "shuffled"]
Mixed = Literal["auto", "no", "bf16", "fp16"]
TypeName = Literal["auto", "float32", "bfloat16", "float16"]
Quantised = Literal["none", "nf4", "int8", "int8-torchao"]
TimestepSampling = Literal["auto", "uniform", "logit-normal"]
PriorTarget = Literal["pictures", "base"]
OnNan = Literal["stop", "skip"]
BIG_SEED = 2**63 - 1


def setting(default: Any, help: str, *, panel: str, least: float | None = None, most: float | None = None) -> Any:
    """A field with what `--help`, the check of a value and the documentation need. `least` and `most` are allowed."""
    about = {"help": help, "panel": panel, "least": least, "most": most}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=about)
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What a training does. Fields are checked by `configuration.checked`; `None` means that krona chooses."""

    # what is trained, on what
    base: str = setting("", "The base: a diffusers folder, a checkpoint file or a Hub id.", panel="Main")
    data: str = setting("", "A folder of pictures, with captions in .txt files or metadata.jsonl.", panel="Main")
    prompt: str = setting("", "The caption of pictures that have none.", panel="Main")
    output: str = setting("", "The run folder.", panel="Main")
    steps: int = setting(500, "Optimizer steps.", panel="Main", least=1)
    batch_size: int = setting(1, "Pictures per process and forward pass.", panel="Main", least=1)
    accumulation: int = setting(1, "Forward passes per optimizer step.", panel="Main", least=1)
    learning_rate: float = setting(1e-3, "Of the optimizer, after the warm-up.", panel="Main", least=0.0)
    resolution: int | None = setting(None, "Pixels: √(width · height). Default: the base's own.", panel="Main", least=8)
    seed: int = setting(0, "Of everything random.", panel="Main", least=0, most=BIG_SEED)
    device: str | None = setting(None, "cpu, cuda, cuda:1, mps. Default: the best there is.", panel="Main")

    # the adapter
    shape: str = setting("auto", "Size of A as a1xa2, or auto: the best cost for --budget.", panel="Adapter")
    shapes: Mapping[str, str] = setting({}, "The shape of the modules that REGEX finds.", panel="Adapter")
    budget: int | None = setting(None, "Parameters that `auto` may spend on all layers.", panel="Adapter", least=1)
    terms: int = setting(1, "Kronecker products that are added up per layer.", panel="Adapter", least=1)
    rank: int | None = setting(None, "Rank of B; without it B is a full matrix.", panel="Adapter", least=1)
    rows: Rows = setting("kron", "Order of rows; `shuffled` is DiffuseKronA's own.", panel="Adapter")
    targets: str = setting("attn", "attn, attn+ff, all, another named set, or a regular expression.", panel="Adapter")
    text_encoders: str = setting("none", "Targets in the text encoders, as --targets, or none.", panel="Adapter")
    init: str | None = setting(None, "Start from this adapter file instead of zero.", panel="Adapter")

    # the data
    trigger_word: str = setting("", "Put in front of captions that lack it.", panel="Data")
    caption_template: str = setting("{caption}", "Text around {caption}.", panel="Data")
    caption_dropout: float = setting(0.0, "Share of captions left empty.", panel="Data", least=0.0, most=1.0)
    caption_shuffle: bool = setting(False, "Shuffle the parts between commas.", panel="Data")
    keep_parts: int = setting(1, "Parts that a shuffle leaves in front.", panel="Data", least=0)
    flip: bool = setting(False, "Mirror every second picture, by chance.", panel="Data")
    buckets: bool = setting(True, "Keep the pictures' proportions, in a few sizes; else squares.", panel="Data")
    skip_bad: bool = setting(False, "Leave out pictures that cannot be read.", panel="Data")
    held_out: int = setting(0, "Pictures that only the validation sees.", panel="Data", least=0)
    validation_data: str | None = setting(None, "A folder of pictures for the validation.", panel="Data")
    prior_data: str | None = setting(None, "A folder of pictures of the class, to keep it.", panel="Data")
    prior_prompt: str = setting("", "Their caption; {a|b} takes each in turn where they are drawn.", panel="Data")
    prior_pictures: int = setting(
        0, "Have so many of the class: the base draws what is missing.", panel="Data", least=0
    )
    prior_target: PriorTarget = setting("pictures", "What they teach: themselves, or the base's answers.", panel="Data")
    prior_weight: float = setting(1.0, "Of their loss.", panel="Data", least=0.0)

    # the loss
    min_snr: float | None = setting(5.0, "Gamma of min-SNR, for epsilon and v; 0 turns it off.", panel="Loss", least=0)
    timesteps: TimestepSampling = setting("auto", "How they are drawn.", panel="Loss")
    logit_mean: float = setting(0.0, "Of logit-normal timesteps.", panel="Loss")
    logit_std: float = setting(1.0, "Of logit-normal timesteps.", panel="Loss", least=0.0)
    noise_offset: float = setting(0.0, "Noise per channel added to the noise.", panel="Loss", least=0.0)
    guidance: float = setting(1.0, "What a guidance-distilled transformer is told.", panel="Loss", least=0.0)

    # the optimizer
    optimizer: str = setting("adamw", "adamw, adamw-8bit, prodigy or schedule-free.", panel="Optimizer")
    weight_decay: float = setting(0.01, "Of the factors.", panel="Optimizer", least=0.0)
    beta1: float = setting(0.9, "Of Adam.", panel="Optimizer", least=0.0, most=1.0)
    beta2: float = setting(0.999, "Of Adam.", panel="Optimizer", least=0.0, most=1.0)
    epsilon: float = setting(1e-8, "Of Adam.", panel="Optimizer", least=0.0)
    schedule: str = setting("constant", "constant, linear, cosine.", panel="Optimizer")
    warmup: int = setting(0, "Steps in which the learning rate grows.", panel="Optimizer", least=0)
    clip: float = setting(1.0, "Largest norm of the gradient; 0 for none.", panel="Optimizer", least=0.0)
    ema: float = setting(0.0, "Decay of a running average of the factors, such as 0.99.", panel="Optimizer",
                         least=0.0, most=0.999999)  # fmt: skip
    nan: OnNan = setting("stop", "What to do when the loss is no number.", panel="Optimizer")

    # speed and memory
    base_dtype: TypeName = setting("auto", "Type of the frozen base: bfloat16 on a GPU.", panel="Machine")
    mixed_precision: Mixed = setting("auto", "Autocast of the forward pass.", panel="Machine")
    cache: bool = setting(True, "Encode pictures and captions once, then free the encoders.", panel="Machine")
    gradient_checkpointing: bool | None = setting(None, "Less memory, more time. Default: on a GPU.", panel="Machine")
    compile: bool = setting(False, "torch.compile the denoiser.", panel="Machine")
    quantize: Quantised = setting("none", "Weights of the base in fewer bits.", panel="Machine")

    # what is kept and shown
    checkpoint_every: int = setting(100, "Steps; 0 for none but the last.", panel="Output", least=0)
    keep_checkpoints: int = setting(2, "Older ones are deleted.", panel="Output", least=1)
    validate_every: int = setting(0, "Steps; 0 for never.", panel="Output", least=0)
    sample_every: int = setting(0, "Steps; 0 for never.", panel="Output", least=0)
    sample_prompts: tuple[str, ...] = setting((), "Prompts of the samples.", panel="Output")
    sample_steps: int = setting(25, "Denoising steps of a sample.", panel="Output", least=1)
    sample_guidance: float = setting(5.0, "Guidance of the samples.", panel="Output", least=0.0)
    export: tuple[str, ...] = setting((), "Formats to write the adapter in, too: lora, lycoris, …", panel="Output")
    trackers: tuple[str, ...] = setting(
        ("auto",), "tensorboard, wandb, trackio; auto: TensorBoard where it is installed; none.", panel="Output"
    )
    licence: str | None = setting(None, "Of the adapter.", panel="Output")

    @property
    def named(self) -> dict[str, Any]:
        """Field -> value, as plain values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class SettingKind:
    """What the annotation of a field allows, read once."""

    def __init__(self, about: Field[Any], annotation: Any) -> None:
        parts = [a for a in get_args(annotation) if a is not type(None)] if _is_union(annotation) else [annotation]
        self.name, self.metadata, self.default = about.name, about.metadata, about.default
        self.optional = _is_union(annotation)
        self.choices: tuple[str, ...] = get_args(parts[0]) if getattr(parts[0], "__origin__", None) is Literal else ()
        origin = getattr(parts[0], "__origin__", parts[0])
        self.type: type = str if self.choices else Mapping if origin is Mapping else origin
        # between texts; prompts have commas of their own
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
