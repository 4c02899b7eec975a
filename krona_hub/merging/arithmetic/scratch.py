"""Working memory of a thread: a few buffers of a tile's size, used again from tile to tile and tensor to tensor."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Buffers(threading.local):
    def __init__(self) -> None:  # runs in each thread
        self.held: dict[tuple[str, torch.dtype], Tensor] = {}


_buffers = _Buffers()


def scratch(use: str, numel: int, dtype: torch.dtype) -> Tensor:
    """`numel` numbers that hold anything: what the same `use` got before, in this thread, is overwritten.

    >>> scratch("doc", 8, torch.float32).data_ptr() == scratch("doc", 4, torch.float32).data_ptr()
    True
    """
    held, key = _buffers.held, (use, dtype)
    found = held.get(key)
    if found is None or found.numel() < numel:
        found = held[key] = torch.empty(numel, dtype=dtype)
    return found if found.numel() == numel else found.narrow(0, 0, numel)
