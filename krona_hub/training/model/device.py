"""Where a training runs: the device, the types of numbers, and the base opened for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from krona_hub.bases.loading import load_base
from krona_hub.errors import NoDeviceError, UnknownBaseError
from krona_hub.pipelines.opening import device_for, loading_errors, no_base, pipeline_for, quiet
from krona_hub.sources import resolve_base
from krona_hub.training.settings import TrainingSettings

AUTOCASTS = {"bfloat16": "bf16", "float16": "fp16"}  # of a base in that type
DENOISERS = ("unet", "transformer")
CONFIGS: Any = diffusers  # whose classes for quantised models are not typed
QUANTISED = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int8-torchao": "torchao"}  # -> package


@dataclass(frozen=True)
class TrainingDevice:
    """What the forward and backward passes run on."""

    device: torch.device
    base_dtype: torch.dtype  # of the frozen weights
    autocast: str  # "no", "bf16" or "fp16"

    @property
    def is_gpu(self) -> bool:
        return self.device.type != "cpu"


def machine_for(settings: TrainingSettings) -> TrainingDevice:
    """The machine that the settings ask for. Raises NoDeviceError where there is none such."""
    device = torch.device(device_for(settings.device))
    dtype = settings.base_dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    autocast: str = settings.mixed_precision
    if autocast == "auto":
        autocast = AUTOCASTS.get(dtype, "no") if device.type == "cuda" else "no"
    return TrainingDevice(device, getattr(torch, dtype), autocast)


def open_base(settings: TrainingSettings, machine: TrainingDevice, *, denoiser_waits: bool = False) -> Any:
    """The pipeline of the base, frozen, on the device; the autoencoder in float32, which some need.

    A denoiser that waits stays on the CPU: it is spread over several devices later.
    Raises NotFoundError, UnknownBaseError or IncompleteError where there is no whole pipeline.
    """
    if not settings.base:
        raise UnknownBaseError("no base was given.", fix="Give --base: a diffusers folder, a file or a Hub id.")
    path = resolve_base(settings.base)
    if not path.exists():
        raise no_base(settings.base)
    with quiet(), loading_errors(settings.base):
        pipe = _loaded(settings, path, machine)
        for name, model in models_of(pipe).items():
            model.requires_grad_(False).eval()
            if not (getattr(model, "is_quantized", False) or (denoiser_waits and name in DENOISERS)):
                model.to(machine.device)
        if getattr(pipe, "vae", None) is not None:
            pipe.vae.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _loaded(settings: TrainingSettings, path: Path, machine: TrainingDevice) -> Any:
    how: dict[str, Any] = {"torch_dtype": machine.base_dtype, "local_files_only": True, **_quantised(settings)}
    if path.is_file():
        kind = pipeline_for(settings.base, load_base(path).family)
        return getattr(diffusers, kind).from_single_file(str(path), **how)
    return diffusers.DiffusionPipeline.from_pretrained(path, use_safetensors=True, **how)  # type: ignore[no-untyped-call]


def _quantised(settings: TrainingSettings) -> dict[str, Any]:
    """What from_pretrained is told for a denoiser in fewer bits. Raises NoDeviceError without the package, and where
    diffusers would refuse to use it: its bitsandbytes wants a GPU.
    """
    if settings.quantize == "none":
        return {}
    package = QUANTISED[settings.quantize]
    if find_spec(package) is None:
        raise NoDeviceError(
            f"--quantize {settings.quantize} needs the package {package}, which is not installed.",
            fix=f"pip install {package}, or leave out --quantize.",
        )
    if package == "bitsandbytes" and not has_gpu():
        raise NoDeviceError(
            f"--quantize {settings.quantize} needs a GPU, and there is none.",
            fix="Leave it out, or take int8-torchao, which works on a CPU.",
        )
    config = _configuration(settings.quantize)
    denoisers = CONFIGS.PipelineQuantizationConfig(quant_mapping=dict.fromkeys(DENOISERS, config))
    return {"quantization_config": denoisers}


def has_gpu() -> bool:
    """Whether there is one that bitsandbytes knows."""
    return torch.cuda.is_available() or torch.xpu.is_available()


def _configuration(how: str) -> Any:
    """What the package of a quantisation is told."""
    if how == "int8-torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return CONFIGS.TorchAoConfig(Int8WeightOnlyConfig())
    if how == "int8":
        return CONFIGS.BitsAndBytesConfig(load_in_8bit=True)
    return CONFIGS.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def models_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """Name -> model of a pipeline."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def peak_memory() -> int:
    """Bytes that this process has held at most, as the system counts them."""
    if sys.platform == "win32":
        from psutil import Process  # comes with accelerate

        return int(Process().memory_info().peak_wset)
    from resource import RUSAGE_SELF, getrusage

    unit = 1 if sys.platform == "darwin" else 1024
    return getrusage(RUSAGE_SELF).ru_maxrss * unit


def is_wanted(accelerator: Accelerator) -> bool:
    """Whether accelerate's own configuration (`accelerate config`, `accelerate launch --use_fsdp`) says FSDP."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def shard(model: Any, accelerator: Accelerator, factors: Sequence[Tensor]) -> None:
    """Spread the weights, block by block: each comes to the device as it is spread, and whole when it is called."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    whole: set[nn.Parameter] = {each for each in factors if isinstance(each, nn.Parameter)}
    for block in [*blocks_of(model), model]:
        fully_shard(block, mesh=mesh, ignored_params=whole)
    for factor in factors:
        factor.data = factor.data.to(accelerator.device)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The parts that diffusers never splits between devices, inner ones first; they are gathered one at a time."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in reversed(list(model.modules())) if type(module).__name__ in names]
