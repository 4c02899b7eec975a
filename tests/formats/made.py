"""Adapters with random numbers for given layers: never alpha = rank, never square on purpose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.kron.shapes import lycoris_factors, peft_factors
from krona_hub.kron.terms import KronTerms, LowRank, as_lora

Shapes = Mapping[str, tuple[int, ...]]
Splitter = Callable[[tuple[int, ...]], tuple[int, int]]  # weight shape -> (a1, a2)


def _rand(generator, *shape) -> torch.Tensor:
    return torch.randn(*shape, generator=generator) * 0.15


def lora(shapes: Shapes, ranks=(2, 3), scale: float = 1.5) -> Adapter:
    """A LoRA whose ranks alternate and whose scale is in the numbers, as a reader leaves it."""
    g = torch.Generator().manual_seed(1)
    layers = {}
    for i, (name, shape) in enumerate(shapes.items()):
        rank = ranks[i % len(ranks)]
        up, down = _rand(g, shape[0], rank) * scale, _rand(g, rank, prod(shape[1:]))
        layers[name] = LayerDelta((as_lora(up, down),), shape)
    return Adapter(layers)


def by_peft(factor: int) -> Splitter:
    return lambda shape: (peft_factors(shape[0], factor)[0], peft_factors(shape[1], factor)[0])


def by_lycoris(factor: int) -> Splitter:
    return lambda shape: (lycoris_factors(shape[0], factor)[0], lycoris_factors(shape[1], factor)[0])


def lokr(shapes: Shapes, split: Splitter, ranks=(None, 2), left_ranks=(None,)) -> Adapter:
    """One term per layer; None stands for a dense factor."""
    g = torch.Generator().manual_seed(2)

    def factor(p: int, q: int, rank: int | None):
        return _rand(g, 1, p, q) * 3 if rank is None else LowRank(_rand(g, 1, p, rank) * 3, _rand(g, 1, rank, q) * 3)

    layers = {}
    for i, (name, shape) in enumerate(shapes.items()):
        a1, a2 = split(shape)
        b1, b2 = shape[0] // a1, prod(shape[1:]) // a2
        term = KronTerms(factor(a1, a2, left_ranks[i % len(left_ranks)]), factor(b1, b2, ranks[i % len(ranks)]))
        layers[name] = LayerDelta((term,), shape)
    return Adapter(layers)


def as_dora(adapter: Adapter, weight_of: Callable[[str], torch.Tensor], axis: str = "out") -> Adapter:
    """The same with a magnitude per output row or input column, a fifth away from the norms of the base."""
    g = torch.Generator().manual_seed(3)
    layers = {}
    for name, delta in adapter.layers.items():
        weight = weight_of(name)
        rows = weight.flatten(1) if axis == "out" else weight.transpose(0, 1).flatten(1)
        magnitude = rows.norm(dim=1) * (1 + 0.2 * torch.randn(len(rows), generator=g))
        layers[name] = LayerDelta(delta.sums, delta.weight_shape, magnitude, axis)
    return Adapter(layers)


def only(adapter: Adapter, component: str) -> Adapter:
    return adapter.with_layers({k: d for k, d in adapter.layers.items() if k.startswith(f"{component}.")})
