"""Diffusers pipelines: loading, placement on a device, scheduler, and arguments of their calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from krona_hub.errors import (
    ResourceError,
    UnknownBaseError,
    UsageError,
)
from krona_hub.images.plan import BasePlan
from krona_hub.images.request import ComputeOptions, Settings, check_multiple
from krona_hub.images.schedulers import SAMPLERS
from krona_hub.pipelines.opening import loading_errors, quiet

OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "not enough memory")


def open_pipeline(base: BasePlan, machine: ComputeOptions, variant: str | None, config: str | None) -> Any:
    """Load the pipeline onto the device, ready to generate. `machine.device` must be available."""
    import torch

    dtype = getattr(torch, dtype_for(base, machine))
    with quiet(), loading_errors(base.source):
        pipe = _loaded(base, dtype, variant, config)
        _place(pipe, machine)
    pipe.set_progress_bar_config(disable=True)
    if machine.tiled_vae:
        pipe.vae.enable_tiling()
        pipe.vae.enable_slicing()
    return pipe


def dtype_for(base: BasePlan, machine: ComputeOptions) -> str:
    """The requested dtype; else float32 on a CPU, bfloat16 for transformers, whose values exceed float16."""
    if machine.dtype or machine.device == "cpu":
        return machine.dtype or "float32"
    folder = base.path / "unet"
    is_unet = folder.is_dir() or (base.family or "").startswith(("sd15", "sd21", "sdxl"))
    return "float16" if is_unet else "bfloat16"


def _loaded(base: BasePlan, dtype: Any, variant: str | None, config: str | None) -> Any:
    import diffusers

    if base.path.is_file():
        more = {"config": config} if config else {}
        name = diffusers.DiffusionPipeline.load_config(config)["_class_name"] if config else base.pipeline
        return getattr(diffusers, str(name)).from_single_file(str(base.path), torch_dtype=dtype, **more)
    options = {"torch_dtype": dtype, "variant": variant, "use_safetensors": True, "local_files_only": True}
    if not hasattr(diffusers, str(base.pipeline)):
        raise UnknownBaseError(
            f"{base.source} needs {base.pipeline}, which diffusers {diffusers.__version__} lacks.",
            fix="Install the diffusers version that its model card names.",
        )
    try:
        return diffusers.AutoPipelineForText2Image.from_pretrained(base.path, **options)  # type: ignore[no-untyped-call]
    except ValueError as problem:  # not in the table of text-to-image pipelines
        if "AutoPipeline" not in str(problem):
            raise
        return diffusers.DiffusionPipeline.from_pretrained(base.path, **options)  # type: ignore[no-untyped-call]


def _place(pipe: Any, machine: ComputeOptions) -> None:
    """Move to the device, or let accelerate move it there piece by piece."""
    if machine.offload == "none":
        pipe.to(machine.device)
        return
    if machine.device == "cpu":
        raise UsageError("Offloading needs a device other than the CPU.", fix="Omit --offload.")
    try:
        moves = {"model": pipe.enable_model_cpu_offload, "sequential": pipe.enable_sequential_cpu_offload}
        moves[machine.offload](device=machine.device)
    except ImportError as problem:
        raise UsageError("Offloading needs accelerate.", fix="pip install accelerate") from problem


# --- schedulers ------------------------------------------------------------------------------------------------------


def set_scheduler(pipe: Any, name: str | None) -> str:
    """Set the scheduler and return its class name; None keeps the base's own.

    Raises UsageError if the base was trained for another kind of scheduler.
    """
    import diffusers

    if name is not None:
        sampler, flow = SAMPLERS[name], "FlowMatch" in type(pipe.scheduler).__name__
        kind = sampler.flow if flow else sampler.kind
        if kind is None or (flow and not _accepts_sigmas(pipe, getattr(diffusers, kind))):
            fits = [n for n, s in SAMPLERS.items() if s.flow and _accepts_sigmas(pipe, getattr(diffusers, s.flow))]
            raise UsageError(
                f"Scheduler {name} does not support a flow-matching base.", fix=f"Use --scheduler {' or '.join(fits)}."
            )
        with quiet():
            pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **sampler.settings)
    return type(pipe.scheduler).__name__


def _accepts_sigmas(pipe: Any, scheduler: Any) -> bool:
    """Whether the scheduler accepts the pipeline's sigmas: FLUX pipelines pass their own, and not all accept them."""
    passes = "sigmas" in call_arguments(pipe) and "Flux" in type(pipe).__name__
    return not passes or "sigmas" in inspect.signature(scheduler.set_timesteps).parameters


# --- calls -----------------------------------------------------------------------------------------------------------


def call_arguments(pipe: Any) -> Mapping[str, Any]:
    """Return name -> default of the arguments of the pipeline's call."""
    return {name: p.default for name, p in inspect.signature(type(pipe).__call__).parameters.items() if name != "self"}


def settings_in_force(pipe: Any, settings: Settings, preferred: tuple[int | None, float | None]) -> Settings:
    """Replace every None in the settings by the base's default, as far as its pipeline has the argument.

    Raises UsageError for what the pipeline does not support: negative prompt, guidance, argument or size.
    """
    takes = call_arguments(pipe)
    kind = type(pipe).__name__
    _check_negative(kind, takes, settings)
    _check_names(kind, takes, settings.more)
    if settings.guidance is not None and "guidance_scale" not in takes:
        raise UsageError(f"{kind} does not support guidance.", fix="Omit --guidance.")
    if settings.size is not None:
        check_multiple(settings.size, size_step(pipe))
    steps = _first(settings.steps, preferred[0], takes.get("num_inference_steps"))
    guidance = _first(settings.guidance, preferred[1], takes.get("guidance_scale"))
    return replace(settings, steps=steps, guidance=guidance)


def _first(*values: Any) -> Any:
    """The first value that is set."""
    return next((v for v in values if v is not None and v is not inspect.Parameter.empty), None)


def _check_negative(kind: str, takes: Mapping[str, Any], settings: Settings) -> None:
    if settings.negative is None:
        return
    if "negative_prompt" not in takes:
        raise UsageError(f"{kind} does not support a negative prompt.", fix="Omit --negative.")
    scale = settings.more.get("true_cfg_scale", takes.get("true_cfg_scale"))
    if isinstance(scale, (int, float)) and scale <= 1:
        raise UsageError(
            f"{kind} uses a negative prompt only with true_cfg_scale above 1.",
            fix="Add --set true_cfg_scale=4, which doubles the work.",
        )


def _check_names(kind: str, takes: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    for name in more:
        if name not in takes:
            near = get_close_matches(name, takes, n=1)
            fix = f"Did you mean {near[0]}?" if near else f"Choose one of {', '.join(sorted(takes))}."
            raise UsageError(f"{kind} has no argument {name}.", fix=fix)


def size_step(pipe: Any) -> int:
    """The number of pixels that both sides of an image must be multiples of."""
    packed = 2 if hasattr(pipe, "_pack_latents") else 1
    return int(getattr(pipe, "vae_scale_factor", 8)) * int(getattr(pipe, "patch_size", packed))


def call_with(settings: Settings, takes: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments of a call for the settings."""
    wide, high = settings.size or (None, None)
    named = {
        "num_inference_steps": settings.steps, "guidance_scale": settings.guidance, "width": wide, "height": high,
    }  # fmt: skip
    return {**{k: v for k, v in named.items() if v is not None and k in takes}, **settings.more}


@contextmanager
def memory_errors(machine: ComputeOptions) -> Iterator[None]:
    """Turn out-of-memory errors into a ResourceError that lists the remedies not in use yet."""
    try:
        yield
    except (MemoryError, RuntimeError) as problem:
        if not (isinstance(problem, MemoryError) or any(words in str(problem) for words in OUT_OF_MEMORY)):
            raise
        raise ResourceError(f"Not enough memory on {machine.device}.", fix=_remedies(machine)) from problem


def _remedies(machine: ComputeOptions) -> str:
    remedies = {
        "--batch 1": machine.batch > 1,
        "--dtype bfloat16": machine.dtype == "float32" and machine.device != "cpu",
        "--tiled-vae": not machine.tiled_vae,
        "--offload model": machine.offload == "none" and machine.device != "cpu",
        "--offload sequential": machine.offload == "model",
        "a smaller --size": True,
    }
    return f"Try {', '.join(option for option, helps in remedies.items() if helps)}."
