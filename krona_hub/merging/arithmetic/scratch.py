"""Working memory of a thread: a few buffers of the size of a tile, reused across tiles and tensors."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Buffers(threading.local):
    def __init__(self) -> None:  # runs in each thread
        self.cached: dict[tuple[str, torch.dtype], Tensor] = {}


_buffers = _Buffers()


def scratch(use: str, numel: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialized buffer of `numel` numbers; the same `use` in the same thread shares memory.

    >>> scratch("doc", 8, torch.float32).data_ptr() == scratch("doc", 4, torch.float32).data_ptr()
    True
    """
    cached, key = _buffers.cached, (use, dtype)
    found = cached.get(key)
    if found is None or found.numel() < numel:
        found = cached[key] = torch.empty(numel, dtype=dtype)
    return found if found.numel() == numel else found.narrow(0, 0, numel)
