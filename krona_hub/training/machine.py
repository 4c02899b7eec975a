"""Where a training runs: the device, the types of numbers, and the base opened for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from krona_hub.bases import catalogue
from krona_hub.bases.base import Base
from krona_hub.errors import IncompleteError, KronaError, NoDeviceError, NotFoundError, UnknownBaseError
from krona_hub.runtime import base_of
from krona_hub.sources import resolve_base
from krona_hub.training.settings import TrainingSettings

QUANTISED = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int8-torchao": "torchao"}  # -> package
SINGLE_FILES = {  # start of a family's name -> the pipeline for its checkpoints in one file
    "sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline", "flux1": "FluxPipeline",
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """What the forward and backward passes run on."""

    device: torch.device
    base_dtype: torch.dtype  # of the frozen weights
    autocast: str  # "no" or "bf16", as accelerate calls them

    @property
    def is_gpu(self) -> bool:
        return self.device.type != "cpu"


def machine_for(settings: TrainingSettings) -> Machine:
    """The machine that the settings ask for. Raises NoDeviceError where there is none such."""
    device = torch.device(_device(settings.device))
    dtype = settings.base_dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    autocast = settings.mixed_precision
    if autocast == "auto":
        autocast = "bf16" if dtype == "bfloat16" and device.type == "cuda" else "no"
    return Machine(device, getattr(torch, dtype), autocast)


def _device(asked: str | None) -> str:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked is None:
        return next(name for name, here in there.items() if here)
    kind, _, number = asked.partition(":")
    known = there.get(kind, False)
    if not known or (number and kind == "cuda" and int(number) >= torch.cuda.device_count()):
        found = ", ".join(name for name, here in there.items() if here)
        raise NoDeviceError(f"this machine has no device {asked} that torch can use.", fix=f"Give --device {found}.")
    return asked


def open_base(settings: TrainingSettings, machine: Machine) -> Any:
    """The pipeline of the base, frozen, on the device; the autoencoder in float32, which some need.

    Raises NotFoundError, UnknownBaseError or IncompleteError where there is no whole pipeline.
    """
    path = resolve_base(settings.base)
    if not path.exists():
        raise _no_base(settings.base)
    with _quiet():
        pipe = _loaded(settings, path, machine)
        for model in models_of(pipe).values():
            model.requires_grad_(False).eval()
            if not getattr(model, "is_quantized", False):
                model.to(machine.device)
        if getattr(pipe, "vae", None) is not None:
            pipe.vae.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars, the warnings and the chatter of diffusers and transformers."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs: tuple[Any, ...] = (diffusers_log, transformers_log)
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    try:
        for log in logs:
            log.set_verbosity_error()
            log.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level, bar in before:
            log.set_verbosity(level)
            if bar:
                log.enable_progress_bar()


def _no_base(source: str) -> KronaError:
    if not source:
        return UnknownBaseError("no base was given.", fix="Give --base: a diffusers folder, a file or a Hub id.")
    if catalogue.find(source) is None:
        return NotFoundError(f"{source}: no such file or folder.", fix="Check the path; a Hub id is written ns/name.")
    hub_id = catalogue.get(source).hub_id
    where = f" or its Hub id, {hub_id}" if hub_id else ""
    return UnknownBaseError(
        f"{source} is the name of a base; its weights are needed.", fix=f"Give its folder, its file{where}."
    )


def _loaded(settings: TrainingSettings, path: Any, machine: Machine) -> Any:
    import diffusers

    how: dict[str, Any] = {"torch_dtype": machine.base_dtype, "local_files_only": True, **_quantised(settings)}
    try:
        if path.is_file():
            return getattr(diffusers, _single_file(path)).from_single_file(str(path), **how)
        return diffusers.DiffusionPipeline.from_pretrained(path, use_safetensors=True, **how)  # type: ignore[no-untyped-call]
    except KronaError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise IncompleteError(
            f"{settings.base} is no whole pipeline that diffusers can open: {first}", fix="Download it again."
        ) from error


def _single_file(path: Any) -> str:
    from krona_hub.bases.locate import load_base

    family = load_base(path).family or ""
    for start, name in SINGLE_FILES.items():
        if family.startswith(start):
            return name
    raise UnknownBaseError(f"{path} is of a kind that krona does not train.", fix="Give it as a diffusers folder.")


def _quantised(settings: TrainingSettings) -> dict[str, Any]:
    """What from_pretrained is told for a denoiser in fewer bits. Raises NoDeviceError without the package."""
    from importlib.util import find_spec

    if settings.quantize == "none":
        return {}
    package = QUANTISED[settings.quantize]
    if find_spec(package) is None:
        raise NoDeviceError(
            f"--quantize {settings.quantize} needs the package {package}, which is not installed.",
            fix=f"pip install {package}, or leave out --quantize.",
        )
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    backends: dict[str, tuple[str, dict[str, Any]]] = {
        "nf4": ("bitsandbytes_4bit", four),
        "int8": ("bitsandbytes_8bit", {"load_in_8bit": True}),
        "int8-torchao": ("torchao", {"quant_type": "int8wo"}),
    }
    backend, arguments = backends[settings.quantize]
    config = PipelineQuantizationConfig(
        quant_backend=backend, quant_kwargs=arguments, components_to_quantize=["unet", "transformer"]
    )
    return {"quantization_config": config}


def models_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """Name -> model of a pipeline."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def trained_base(pipe: Any) -> Base:
    """The names and shapes of a pipeline's layers."""
    return base_of(pipe)
