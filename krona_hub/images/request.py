"""The request of `generate`, checked before anything is loaded. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from krona_hub.errors import UsageError
from krona_hub.images.schedulers import sampler_named

DEVICES = ("cpu", "cuda", "mps", "xpu")
DTYPES = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
OFFLOADS = ("none", "model", "sequential")
MULTIPLE = 8  # pixels per latent pixel of the supported autoencoders
MOST_STEPS = 1000
OURS = (  # arguments of a pipeline's call that `more` must not set
    "prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "width", "height", "generator", "latents",
    "num_images_per_prompt", "output_type", "return_dict", "callback_on_step_end", "callback", "callback_steps",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What an image depends on besides base, adapters, prompt and seed. None leaves a setting to the base."""

    negative: str | None = None
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None  # a name of SAMPLERS
    size: tuple[int, int] | None = None  # pixels, width and height
    more: Mapping[str, Any] = field(default_factory=dict)  # additional arguments of the pipeline's call


@dataclass(frozen=True)
class ComputeOptions:
    """Where and how to compute: changes images by rounding at most."""

    device: str | None = None  # None: the best available
    dtype: str | None = None  # None: float32 on a CPU, else the 16-bit type that suits the base
    offload: str = "none"
    tiled_vae: bool = False
    batch: int = 1  # images computed together


@dataclass(frozen=True)
class GenerateRequest:
    """All checked arguments of `generate`."""

    base: str
    prompts: tuple[str, ...]
    adapters: tuple[tuple[str, float], ...]  # source and strength
    seed: int  # of the first image of each prompt; the following seeds count up
    images_per_prompt: int
    settings: Settings
    machine: ComputeOptions
    strengths: tuple[float, ...]  # (): each adapter at its own strength
    together: bool
    compare: bool | None  # add a column without adapters; None: only if several adapters are compared
    beside: tuple[str, ...]  # additional bases, without adapters
    variant: str | None
    config: str | None  # diffusers folder or Hub id with the configuration of a single file

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seed, self.seed + self.images_per_prompt))


def checked_prompts(prompts: str | Sequence[str]) -> tuple[str, ...]:
    """Check one or several prompts. Raises UsageError for a missing or empty prompt."""
    given = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not given or any(not p.strip() for p in given):
        cause = "A prompt is empty." if given else "Missing option --prompt."
        raise UsageError(cause, fix='Specify one or several prompts: --prompt "a photo of a red cube".')
    return given


def checked_settings(
    negative: str | None,
    steps: int | None,
    guidance: float | None,
    scheduler: str | None,
    size: str | int | Sequence[int] | None,
    more: Mapping[str, Any],
) -> Settings:
    """Check the settings. Raises UsageError with the accepted values."""
    if steps is not None and not 1 <= steps <= MOST_STEPS:
        raise UsageError(f"Invalid number of steps {steps}.", fix=f"Use --steps from 1 to {MOST_STEPS}, such as 25.")
    if guidance is not None and not (isfinite(guidance) and guidance >= 0):
        raise UsageError(f"Invalid guidance {guidance:g}.", fix="Use a finite number of 0 or more, such as 7.5.")
    for name in more:
        if name in OURS:
            raise UsageError(f"{name} has an option of its own.", fix="See krona generate --help for it.")
    named = None if scheduler in (None, "default") else sampler_named(str(scheduler))
    return Settings(negative or None, steps, guidance, named, parse_size(size), dict(more))


def checked_machine(
    device: str | None, dtype: str | None, offload: str | None, tiled_vae: bool, batch: int
) -> ComputeOptions:
    """Check the compute options as far as possible without the device. Raises UsageError."""
    if device is not None and device.partition(":")[0] not in DEVICES:
        raise UsageError(f"Unknown device {device!r}.", fix=f"Use one of {', '.join(DEVICES)}, or cuda:1.")
    named = None if dtype is None else DTYPES.get(dtype, dtype)
    if named not in (None, *DTYPES.values()):
        raise UsageError(f"Unsupported dtype {dtype}.", fix="Use float32, float16 or bfloat16.")
    if offload not in (None, *OFFLOADS):
        raise UsageError(f"Unknown offload mode {offload!r}.", fix=f"Use one of {', '.join(OFFLOADS)}.")
    if device == "cpu" and offload not in (None, "none"):
        raise UsageError("Offloading needs a device other than the CPU.", fix="Omit --offload, or --device cpu.")
    if batch < 1:
        raise UsageError(f"Invalid batch size {batch}.", fix="Use --batch 1 or more.")
    return ComputeOptions(device, named, offload or "none", tiled_vae, batch)


def checked_strengths(
    strengths: Sequence[float], adapters: Sequence[tuple[str, float]], together: bool, compare: bool | None
) -> tuple[float, ...]:
    """Check the strengths and remove duplicates. Raises UsageError without an adapter."""
    flags = [flag for flag, given in (("--strengths", strengths), ("--together", together)) if given]
    if flags and not adapters:
        raise UsageError(f"{flags[0]} needs an adapter.", fix="Specify one: --adapter FILE.")
    if compare and not adapters:
        raise UsageError("Missing adapter to compare with.", fix="Specify one: --adapter FILE.")
    if not all(isfinite(s) for s in (*strengths, *(weight for _, weight in adapters))):
        raise UsageError("A strength is NaN or infinite.", fix="Use finite numbers, such as 0,0.5,1.")
    return tuple(dict.fromkeys(map(float, strengths)))


def parse_size(size: str | int | Sequence[int] | None) -> tuple[int, int] | None:
    """Parse width and height in pixels, as `768x512` or one number for both.

    >>> parse_size("768x512"), parse_size("64"), parse_size((64, 32))
    ((768, 512), (64, 64), (64, 32))

    Raises UsageError with the nearest valid size.
    """
    if size is None:
        return None
    if isinstance(size, str):
        words: Sequence[str | int] = size.lower().replace("×", "x").split("x")
    else:
        words = [size] if isinstance(size, int) else size
    try:
        numbers = [int(w) for w in words]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise UsageError(f"Invalid size {size!r}.", fix="Specify width x height in pixels: --size 768x512.")
    wide, high = numbers[0], numbers[-1]
    check_multiple((wide, high), MULTIPLE)
    return wide, high


def check_multiple(size: tuple[int, int], multiple: int) -> None:
    """Raise UsageError with the nearest valid size if a side is not a multiple of `multiple` pixels."""
    if any(side % multiple for side in size):
        nearest = "x".join(str(max(1, (side + multiple // 2) // multiple) * multiple) for side in size)
        raise UsageError(
            f"Invalid size {size[0]}x{size[1]}: both sides must be multiples of {multiple} pixels.",
            fix=f"Use --size {nearest}.",
        )


def checked_seed(seed: int, images_per_prompt: int) -> int:
    """Check that all seeds are valid for the random generator. Raises UsageError."""
    if images_per_prompt < 1:
        raise UsageError(f"Invalid number of images per prompt {images_per_prompt}.", fix="Use 1 or more.")
    if not 0 <= seed < 2**63 - images_per_prompt:
        raise UsageError(f"Invalid seed {seed}.", fix="Use an integer from 0 to 2^63.")
    return seed


def stem_of(source: str) -> str:
    """Return the label of an adapter or a base.

    >>> stem_of("a/style.safetensors"), stem_of("hf://ns/name@v1"), stem_of("models/mine/"), stem_of("v1.5-style")
    ('style', 'name', 'mine', 'v1.5-style')
    """
    name = Path(source).name
    for ending in (".safetensors", ".ckpt", ".krona"):
        name = name.removesuffix(ending)
    return (name.partition("@")[0] if source.startswith("hf://") else name) or source
