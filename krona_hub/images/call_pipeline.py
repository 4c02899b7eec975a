"""Pipelines of diffusers: opened, put on a device, given a scheduler; and what their calls take."""

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
from krona_hub.pipelines.opening import quiet, told

OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "not enough memory")


def open_pipeline(base: BasePlan, machine: ComputeOptions, variant: str | None, config: str | None) -> Any:
    """The pipeline with its weights on the device, ready to draw. `machine.device` is one that there is."""
    import torch

    dtype = getattr(torch, dtype_for(base, machine))
    with quiet(), told(base.source):
        pipe = _loaded(base, dtype, variant, config)
        _place(pipe, machine)
    pipe.set_progress_bar_config(disable=True)
    if machine.tiled_vae:
        pipe.vae.enable_tiling()
        pipe.vae.enable_slicing()
    return pipe


def dtype_for(base: BasePlan, machine: ComputeOptions) -> str:
    """What was asked for; else float32 on a CPU, bfloat16 for transformers, whose numbers exceed float16's."""
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
    how = {"torch_dtype": dtype, "variant": variant, "use_safetensors": True, "local_files_only": True}
    if not hasattr(diffusers, str(base.pipeline)):
        raise UnknownBaseError(
            f"{base.source} is for {base.pipeline}, which diffusers {diffusers.__version__} does not have.",
            fix="Install the version of diffusers that its model card names.",
        )
    try:
        return diffusers.AutoPipelineForText2Image.from_pretrained(base.path, **how)  # type: ignore[no-untyped-call]
    except ValueError as problem:  # what has no entry in the table of text-to-image pipelines
        if "AutoPipeline" not in str(problem):
            raise
        return diffusers.DiffusionPipeline.from_pretrained(base.path, **how)  # type: ignore[no-untyped-call]


def _place(pipe: Any, machine: ComputeOptions) -> None:
    """On the device, or where accelerate moves it there piece by piece."""
    if machine.offload == "none":
        pipe.to(machine.device)
        return
    if machine.device == "cpu":
        raise UsageError("there is nothing to offload from a CPU.", fix="Leave out --offload.")
    try:
        moves = {"model": pipe.enable_model_cpu_offload, "sequential": pipe.enable_sequential_cpu_offload}
        moves[machine.offload](device=machine.device)
    except ImportError as problem:
        raise UsageError("offloading needs accelerate.", fix="pip install accelerate") from problem


# --- schedulers ------------------------------------------------------------------------------------------------------


def set_scheduler(pipe: Any, name: str | None) -> str:
    """Exchange the scheduler; the class that the pipeline has then. None keeps the base's own.

    Raises UsageError where the base was trained for another kind.
    """
    import diffusers

    if name is not None:
        sampler, flow = SAMPLERS[name], "FlowMatch" in type(pipe.scheduler).__name__
        kind = sampler.flow if flow else sampler.kind
        if kind is None or (flow and not _takes_its_sigmas(pipe, getattr(diffusers, kind))):
            fits = [n for n, s in SAMPLERS.items() if s.flow and _takes_its_sigmas(pipe, getattr(diffusers, s.flow))]
            raise UsageError(
                f"{name} is no scheduler for a base of flow matching.", fix=f"Give --scheduler {' or '.join(fits)}."
            )
        with quiet():
            pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **sampler.settings)
    return type(pipe.scheduler).__name__


def _takes_its_sigmas(pipe: Any, scheduler: Any) -> bool:
    """FLUX's pipelines hand their own sigmas to the scheduler, which not every one of them takes."""
    hands = "sigmas" in call_arguments(pipe) and "Flux" in type(pipe).__name__
    return not hands or "sigmas" in inspect.signature(scheduler.set_timesteps).parameters


# --- calls -----------------------------------------------------------------------------------------------------------


def call_arguments(pipe: Any) -> Mapping[str, Any]:
    """Name -> default of what the pipeline's call takes."""
    return {name: p.default for name, p in inspect.signature(type(pipe).__call__).parameters.items() if name != "self"}


def settings_in_force(pipe: Any, settings: Settings, preferred: tuple[int | None, float | None]) -> Settings:
    """The settings with every None replaced by what the base prefers, as far as its pipeline takes it.

    Raises UsageError for what it does not take: a negative prompt, a guidance, a name, a size.
    """
    takes = call_arguments(pipe)
    kind = type(pipe).__name__
    _check_negative(kind, takes, settings)
    _check_names(kind, takes, settings.more)
    if settings.guidance is not None and "guidance_scale" not in takes:
        raise UsageError(f"{kind} takes no guidance.", fix="Leave out --guidance.")
    if settings.size is not None:
        check_multiple(settings.size, size_step(pipe))
    steps = _first(settings.steps, preferred[0], takes.get("num_inference_steps"))
    guidance = _first(settings.guidance, preferred[1], takes.get("guidance_scale"))
    return replace(settings, steps=steps, guidance=guidance)


def _first(*values: Any) -> Any:
    """The first that says something."""
    return next((v for v in values if v is not None and v is not inspect.Parameter.empty), None)


def _check_negative(kind: str, takes: Mapping[str, Any], settings: Settings) -> None:
    if settings.negative is None:
        return
    if "negative_prompt" not in takes:
        raise UsageError(f"{kind} takes no negative prompt.", fix="Leave out --negative.")
    scale = settings.more.get("true_cfg_scale", takes.get("true_cfg_scale"))
    if isinstance(scale, (int, float)) and scale <= 1:
        raise UsageError(
            f"{kind} looks at a negative prompt only with true_cfg_scale above 1.",
            fix="Add --set true_cfg_scale=4, which doubles the work.",
        )


def _check_names(kind: str, takes: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    for name in more:
        if name not in takes:
            near = get_close_matches(name, takes, n=1)
            fix = f"Did you mean {near[0]}?" if near else f"It takes {', '.join(sorted(takes))}."
            raise UsageError(f"{kind} takes no {name}.", fix=fix)


def size_step(pipe: Any) -> int:
    """What both sides of a picture must be multiples of, in pixels."""
    packed = 2 if hasattr(pipe, "_pack_latents") else 1
    return int(getattr(pipe, "vae_scale_factor", 8)) * int(getattr(pipe, "patch_size", packed))


def call_with(settings: Settings, takes: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments of a call that stand for the settings."""
    wide, high = settings.size or (None, None)
    named = {
        "num_inference_steps": settings.steps, "guidance_scale": settings.guidance, "width": wide, "height": high,
    }  # fmt: skip
    return {**{k: v for k, v in named.items() if v is not None and k in takes}, **settings.more}


@contextmanager
def memory_told(machine: ComputeOptions) -> Iterator[None]:
    """A memory that is full, as an error with the ways out that were not yet taken."""
    try:
        yield
    except (MemoryError, RuntimeError) as problem:
        if not (isinstance(problem, MemoryError) or any(words in str(problem) for words in OUT_OF_MEMORY)):
            raise
        raise ResourceError(f"not enough memory on {machine.device}.", fix=_ways_out(machine)) from problem


def _ways_out(machine: ComputeOptions) -> str:
    ways = {
        "--batch 1": machine.batch > 1,
        "--dtype bfloat16": machine.dtype == "float32" and machine.device != "cpu",
        "--tiled-vae": not machine.tiled_vae,
        "--offload model": machine.offload == "none" and machine.device != "cpu",
        "--offload sequential": machine.offload == "model",
        "a smaller --size": True,
    }
    return f"Try {', '.join(way for way, open_ in ways.items() if open_)}."
