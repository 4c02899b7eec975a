"""Choose the device and the data types of a run, and open the base model for them."""

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
from krona_hub.pipelines.opening import device_for, loading_errors, missing_base_error, pipeline_for, quiet
from krona_hub.sources import resolve_base
from krona_hub.training.settings import TrainingSettings

AUTOCASTS = {"bfloat16": "bf16", "float16": "fp16"}  # data type of the base model -> autocast mode
DENOISERS = ("unet", "transformer")
CONFIGS: Any = diffusers  # its quantization classes have no type annotations
QUANTIZATION_PACKAGES = {
    "nf4": "bitsandbytes",
    "int8": "bitsandbytes",
    "int8-torchao": "torchao",
}  # --quantize -> package


@dataclass(frozen=True)
class TrainingDevice:
    """Device and data types of the forward and backward passes."""

    device: torch.device
    base_dtype: torch.dtype  # of the frozen weights
    autocast: str  # "no", "bf16" or "fp16"

    @property
    def is_gpu(self) -> bool:
        return self.device.type != "cpu"


def machine_for(settings: TrainingSettings) -> TrainingDevice:
    """Return the device of the settings. Raises NoDeviceError if it is not available."""
    device = torch.device(device_for(settings.device))
    dtype = settings.base_dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    autocast: str = settings.mixed_precision
    if autocast == "auto":
        autocast = AUTOCASTS.get(dtype, "no") if device.type == "cuda" else "no"
    return TrainingDevice(device, getattr(torch, dtype), autocast)


def open_base(settings: TrainingSettings, machine: TrainingDevice, *, denoiser_waits: bool = False) -> Any:
    """Open the frozen pipeline of the base model on the device. The autoencoder is in float32, as some require.

    With `denoiser_waits`, the denoiser stays on the CPU, because it is sharded over several devices later.
    Raises NotFoundError, UnknownBaseError or IncompleteError if the pipeline is missing or incomplete.
    """
    if not settings.base:
        raise UnknownBaseError(
            "Missing option --base.", fix="Specify --base: a diffusers folder, a checkpoint file or a Hub id."
        )
    path = resolve_base(settings.base)
    if not path.exists():
        raise missing_base_error(settings.base)
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
    arguments: dict[str, Any] = {
        "torch_dtype": machine.base_dtype,
        "local_files_only": True,
        **_quantization_arguments(settings),
    }
    if path.is_file():
        kind = pipeline_for(settings.base, load_base(path).family)
        return getattr(diffusers, kind).from_single_file(str(path), **arguments)
    return diffusers.DiffusionPipeline.from_pretrained(path, use_safetensors=True, **arguments)  # type: ignore[no-untyped-call]


def _quantization_arguments(settings: TrainingSettings) -> dict[str, Any]:
    """Return the from_pretrained arguments for a quantized denoiser.

    Raises NoDeviceError if the package is not installed, or if it is bitsandbytes, which diffusers supports only on a
    GPU, and there is no GPU.
    """
    if settings.quantize == "none":
        return {}
    package = QUANTIZATION_PACKAGES[settings.quantize]
    if find_spec(package) is None:
        raise NoDeviceError(
            f"--quantize {settings.quantize} requires the package {package}, which is not installed.",
            fix=f"Run pip install {package}, or remove --quantize.",
        )
    if package == "bitsandbytes" and not has_gpu():
        raise NoDeviceError(
            f"--quantize {settings.quantize} requires a GPU, and none was found.",
            fix="Remove it, or use int8-torchao, which works on a CPU.",
        )
    config = _quantization_config(settings.quantize)
    denoisers = CONFIGS.PipelineQuantizationConfig(quant_mapping=dict.fromkeys(DENOISERS, config))
    return {"quantization_config": denoisers}


def has_gpu() -> bool:
    """Return whether a GPU that bitsandbytes supports is available."""
    return torch.cuda.is_available() or torch.xpu.is_available()


def _quantization_config(method: str) -> Any:
    if method == "int8-torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return CONFIGS.TorchAoConfig(Int8WeightOnlyConfig())
    if method == "int8":
        return CONFIGS.BitsAndBytesConfig(load_in_8bit=True)
    return CONFIGS.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def models_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """Return the models of a pipeline by component name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def peak_memory() -> int:
    """Return the peak memory of this process in bytes, as the operating system reports it."""
    if sys.platform == "win32":
        from psutil import Process  # a dependency of accelerate

        return int(Process().memory_info().peak_wset)
    from resource import RUSAGE_SELF, getrusage

    unit = 1 if sys.platform == "darwin" else 1024
    return getrusage(RUSAGE_SELF).ru_maxrss * unit


def uses_fsdp(accelerator: Accelerator) -> bool:
    """Return whether `accelerate config` or `accelerate launch --use_fsdp` enables FSDP."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def shard(model: Any, accelerator: Accelerator, factors: Sequence[Tensor]) -> None:
    """Shard the weights block by block. A block moves to the device when sharded, and is gathered when called.

    The factors stay whole in every process.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    unsharded: set[nn.Parameter] = {each for each in factors if isinstance(each, nn.Parameter)}
    for block in [*blocks_of(model), model]:
        fully_shard(block, mesh=mesh, ignored_params=unsharded)
    for factor in factors:
        factor.data = factor.data.to(accelerator.device)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules that diffusers never splits between devices, inner ones first. Each is gathered as a unit."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in reversed(list(model.modules())) if type(module).__name__ in names]
