"""Random numbers of a training run as functions of seed, purpose, step and sample, not of process, batch or history.

Therefore several processes use the same numbers as one, and a resumed run the same as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """Return a new CPU generator for one purpose.

    >>> a, b = (torch.rand(1, generator=generator(7, "noise", 3, 0)).item() for _ in range(2))
    >>> a == b, a == torch.rand(1, generator=generator(7, "noise", 3, 1)).item()
    (True, False)
    """
    text = "/".join([str(seed), purpose, *map(str, numbers)])
    digest = blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def uniform(seed: int, purpose: str, *numbers: int) -> float:
    """Return a uniform float32 number in [0, 1)."""
    return float(torch.rand((), generator=generator(seed, purpose, *numbers)))


def permutation(count: int, seed: int, purpose: str, *numbers: int) -> list[int]:
    """Return range(count) in a random order."""
    order: list[int] = torch.randperm(count, generator=generator(seed, purpose, *numbers)).tolist()
    return order


def noise(shape: Sequence[int], seed: int, step: int, samples: Sequence[int], offset: float = 0.0) -> Tensor:
    """Return (samples, *shape) normal noise, plus `offset` times one normal number per channel of each sample."""
    return torch.stack([_noise(shape, generator(seed, "noise", step, i), offset) for i in samples])


def _noise(shape: Sequence[int], source: torch.Generator, offset: float) -> Tensor:
    plain = torch.randn(*shape, generator=source)
    per_channel = torch.randn(shape[0], *(1,) * (len(shape) - 1), generator=source)
    return plain + offset * per_channel if offset else plain
