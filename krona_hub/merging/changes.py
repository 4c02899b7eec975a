"""A stored tensor with its patches, as a change of the bytes of a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from krona_hub.checkpoints.entries import TensorInfo
from krona_hub.checkpoints.rewrite import ByteSink, Change
from krona_hub.checkpoints.writer import DTYPE_NAMES
from krona_hub.merging.patches import Patch
from krona_hub.merging.rounding import NEAREST, Rounding, Survival
from krona_hub.merging.tiles import merge_tensor

DTYPES = {stored: getattr(torch, name) for name, stored in DTYPE_NAMES.items() if hasattr(torch, name)}


def change_of(
    info: TensorInfo,
    patches: Sequence[Patch],
    *,
    out_dtype: str,
    note: Callable[[Survival], None],
    rounding: Rounding = NEAREST,
    name: str = "",
) -> Change:
    """The change of a tensor of a file into W + Σ w·ΔW of type `out_dtype`, as in the header (F16, …).

    `note` gets what survived the rounding, on the thread that did the work. Raises as `merge_tensor` does, when the
    change is made.
    """

    def produce(old: memoryview, sink: ByteSink) -> None:
        def send(first: int, tile: Tensor) -> None:
            sink(first * tile.itemsize, bytes_of(tile))

        weight = tensor_of(old, info)
        note(merge_tensor(weight, patches, send, out_dtype=DTYPES[out_dtype], rounding=rounding, name=name))

    return Change(out_dtype, produce)


def tensor_of(data: memoryview, info: TensorInfo) -> Tensor:
    """The bytes of a file as the tensor that they are, without a copy; it must only be read."""
    if not info.numel:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    flat = torch.from_numpy(np.asarray(_Writable(data)))
    return flat.view(DTYPES[info.dtype]).view(info.shape)


def bytes_of(tile: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return memoryview(tile.view(torch.uint8).numpy())  # type: ignore[arg-type]


class _Writable:
    """Bytes that say they may be written to: torch knows no read-only tensors, and warns of each."""

    def __init__(self, data: memoryview) -> None:
        self.flat = np.frombuffer(data, np.uint8)
        interface = self.flat.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
