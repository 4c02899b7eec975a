"""A denoiser that is too large for one device, in pieces over all of them: torch's FSDP2 of the frozen weights.

The factors stay whole in every process, so that steps, checkpoints and the adapter are those of data parallel training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


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
