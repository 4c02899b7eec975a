"""What is asked of `generate`, checked before anything is loaded. Torch-free."""

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
MULTIPLE = 8  # pixels: one latent pixel of every autoencoder that there is
MOST_STEPS = 1000
OURS = (  # arguments of a pipeline's call that are not to be set by name
    "prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "width", "height", "generator", "latents",
    "num_images_per_prompt", "output_type", "return_dict", "callback_on_step_end", "callback", "callback_steps",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What a picture depends on besides base, adapters, prompt and seed. None: what the base prefers."""

    negative: str | None = None
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None  # a name of SAMPLERS
    size: tuple[int, int] | None = None  # pixels, width and height
    more: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the pipeline's call


@dataclass(frozen=True)
class ComputeOptions:
    """Where and how it is computed: changes pictures by rounding at most."""

    device: str | None = None  # None: the best that there is
    dtype: str | None = None  # None: float32 on a CPU, else the half type that suits the base
    offload: str = "none"
    tiled_vae: bool = False
    batch: int = 1  # pictures that are computed together


@dataclass(frozen=True)
class GenerateRequest:
    """Everything that was asked."""

    base: str
    prompts: tuple[str, ...]
    adapters: tuple[tuple[str, float], ...]  # source and weight
    seed: int  # of the first picture of each prompt; the next have the next
    images_per_prompt: int
    settings: Settings
    machine: ComputeOptions
    strengths: tuple[float, ...]  # (): each adapter at its weight
    together: bool
    compare: bool | None  # a column without adapters; None: where several adapters are compared
    beside: tuple[str, ...]  # further bases, without adapters
    variant: str | None
    config: str | None  # diffusers folder or Hub id with the configuration of a single file

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seed, self.seed + self.images_per_prompt))


def checked_prompts(prompts: str | Sequence[str]) -> tuple[str, ...]:
    """One prompt or several. Raises UsageError for none."""
    given = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not given or any(not p.strip() for p in given):
        cause = "a prompt is empty." if given else "there is no prompt."
        raise UsageError(
            cause, fix='Say what to draw: --prompt "a photo of a red cube". It may be given several times.'
        )
    return given


def checked_settings(
    negative: str | None,
    steps: int | None,
    guidance: float | None,
    scheduler: str | None,
    size: str | int | Sequence[int] | None,
    more: Mapping[str, Any],
) -> Settings:
    """The settings, each looked at. Raises UsageError with what it may be."""
    if steps is not None and not 1 <= steps <= MOST_STEPS:
        raise UsageError(f"{steps} steps cannot be done.", fix=f"Give --steps from 1 to {MOST_STEPS}, such as 25.")
    if guidance is not None and not (isfinite(guidance) and guidance >= 0):
        raise UsageError(f"a guidance of {guidance:g} means nothing.", fix="Give a number from 0, such as 7.5.")
    for name in more:
        if name in OURS:
            raise UsageError(f"{name} is set by an option of its own.", fix="krona generate --help lists them.")
    named = None if scheduler in (None, "default") else sampler_named(str(scheduler))
    return Settings(negative or None, steps, guidance, named, parse_size(size), dict(more))


def checked_machine(
    device: str | None, dtype: str | None, offload: str | None, tiled_vae: bool, batch: int
) -> ComputeOptions:
    """The machine's part, as far as it can be judged without looking at the machine. Raises UsageError."""
    if device is not None and device.partition(":")[0] not in DEVICES:
        raise UsageError(f"there is no device {device!r}.", fix=f"Give one of {', '.join(DEVICES)}, or cuda:1.")
    named = None if dtype is None else DTYPES.get(dtype, dtype)
    if named not in (None, *DTYPES.values()):
        raise UsageError(f"pictures are not computed in {dtype}.", fix="Give float32, float16 or bfloat16.")
    if offload not in (None, *OFFLOADS):
        raise UsageError(f"there is no offload {offload!r}.", fix=f"Give one of {', '.join(OFFLOADS)}.")
    if device == "cpu" and offload not in (None, "none"):
        raise UsageError("there is nothing to offload from a CPU.", fix="Leave out --offload, or --device cpu.")
    if batch < 1:
        raise UsageError(f"{batch} pictures at a time are none.", fix="Give --batch 1 or more.")
    return ComputeOptions(device, named, offload or "none", tiled_vae, batch)


def checked_strengths(
    strengths: Sequence[float], adapters: Sequence[tuple[str, float]], together: bool, compare: bool | None
) -> tuple[float, ...]:
    """The strengths, each once. Raises UsageError where there is nothing that has a strength."""
    request = [word for word, given in (("--strengths", strengths), ("--together", together)) if given]
    if request and not adapters:
        raise UsageError(f"{request[0]} without an adapter means nothing.", fix="Name one: --adapter FILE.")
    if compare and not adapters:
        raise UsageError("there is no adapter to compare with.", fix="Name one: --adapter FILE.")
    if not all(isfinite(s) for s in (*strengths, *(weight for _, weight in adapters))):
        raise UsageError("a strength is no finite number.", fix="Give numbers, such as 0,0.5,1.")
    return tuple(dict.fromkeys(map(float, strengths)))


def parse_size(size: str | int | Sequence[int] | None) -> tuple[int, int] | None:
    """Width and height in pixels, of `768x512` or of one number for both.

    >>> parse_size("768x512"), parse_size("64"), parse_size((64, 32))
    ((768, 512), (64, 64), (64, 32))

    Raises UsageError with the nearest sizes that are possible.
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
        raise UsageError(f"{size!r} is no size.", fix="Give width x height in pixels: --size 768x512.")
    wide, high = numbers[0], numbers[-1]
    check_multiple((wide, high), MULTIPLE)
    return wide, high


def check_multiple(size: tuple[int, int], multiple: int) -> None:
    """Raise UsageError where a side is not a multiple of so many pixels, with the nearest size that is."""
    if any(side % multiple for side in size):
        nearest = "x".join(str(max(1, (side + multiple // 2) // multiple) * multiple) for side in size)
        raise UsageError(
            f"{size[0]}x{size[1]} pixels: both sides must be multiples of {multiple}.", fix=f"Take --size {nearest}."
        )


def checked_seed(seed: int, images_per_prompt: int) -> int:
    """Raises UsageError for a seed that the generator does not take."""
    if images_per_prompt < 1:
        raise UsageError(f"{images_per_prompt} pictures of a prompt are none.", fix="Ask for 1 or more.")
    if not 0 <= seed < 2**63 - images_per_prompt:
        raise UsageError(f"{seed} is no seed.", fix="Give a whole number from 0 to 2^63.")
    return seed


def stem_of(source: str) -> str:
    """What an adapter or a base is called in labels.

    >>> stem_of("a/style.safetensors"), stem_of("hf://ns/name@v1"), stem_of("models/mine/"), stem_of("v1.5-style")
    ('style', 'name', 'mine', 'v1.5-style')
    """
    name = Path(source).name
    for ending in (".safetensors", ".ckpt", ".krona"):
        name = name.removesuffix(ending)
    return (name.partition("@")[0] if source.startswith("hf://") else name) or source
